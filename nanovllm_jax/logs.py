"""What the terminal shows: this package's lines, and not those of two libraries that tell its users nothing."""

import logging
import sys
from functools import partial

NOISE = {
    "transformers": "Models won't be available",  # "PyTorch was not found ...": nothing here needs it
    "jax._src.xla_bridge": "Unable to initialize backend 'tpu'",
}


class TerminalHandler(logging.Handler):
    """Writes to stderr, unless the program has set up logging itself: then its own handlers show the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


def set_up_logging() -> None:
    """Show INFO and above. A level or handler that the program gave the logger "nanovllm_jax" before is kept."""
    logger = logging.getLogger("nanovllm_jax")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = TerminalHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    for name, text in NOISE.items():
        logging.getLogger(name).addFilter(partial(_lacks, text))


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in str(record.msg)
