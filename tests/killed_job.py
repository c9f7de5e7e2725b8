"""A process that generates without end, for the test that kills it: `python killed_job.py CHECKPOINT CACHE PIDS`."""

import os
import sys
from pathlib import Path

import jax
from small_model import small_llm

from nanovllm_jax import SamplingParams

directory, cache, pids = sys.argv[1:]
llm = small_llm(directory, tensor_parallel_size=2, max_num_seqs=1, compilation_cache_dir=cache)
endless = SamplingParams(max_tokens=100, ignore_eos=True)
llm.generate([1, 2, 3], endless, use_tqdm=False)
Path(f"{pids}{jax.process_index()}").write_text(str(os.getpid()))
while True:
    llm.generate([1, 2, 3], endless, use_tqdm=False)
