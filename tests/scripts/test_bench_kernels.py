"""bench_kernels.py's problems on a CPU, where the oracle stands in for the kernel."""

from functools import partial
from types import SimpleNamespace

import bench_kernels
import jax
import jax.numpy as jnp
import pytest
from benchmark import kernel_cases
from benchmark.kernel_cases import Shape, make_cases

SMALL = {"decode": (2, 20, 40), "new": (2, 20), "prefill": (2, 16, 40), "store": 3, "norm": 3, "row": (2, 32)}
SMALL |= {"shared": (4, 2, 16, 8), "hopper": (2, 16, 16), "swiglu": (16, 32)}


@pytest.mark.parametrize("kernel", SMALL)
def test_oracles_take_the_inputs_that_are_made(kernel, monkeypatch, capsys):
    makers = {name: maker for name, (maker, _) in kernel_cases.KERNELS.items()}
    makers |= {"hopper": kernel_cases.hopper_case, "swiglu": kernel_cases.swiglu_case}
    monkeypatch.setattr(kernel_cases, "KERNELS", {kernel: (makers[kernel], [SMALL[kernel]])})
    monkeypatch.setattr(kernel_cases, "TABLE_TOKENS", 64)
    monkeypatch.setattr(kernel_cases, "sets_for", lambda _: 2)
    monkeypatch.setattr(bench_kernels, "CHAINED_CALLS", 4)
    shape = Shape(kv_heads=2, group=2, head_dim=16, block_size=16, hidden=32, dtype=jnp.dtype("float32"))
    [case] = make_cases(shape, 256, [kernel])
    args = SimpleNamespace(bandwidth=1.0, flops=1.0)
    for factor, error in ((1, "0.0e+00"), (2, "1.0e+00")):
        call = partial(_times, factor, case.oracle)
        stand_in = case._replace(call=call, first_prefill=None)  # nor is cuDNN here
        bench_kernels.bench(stand_in, shape, args)
        line = capsys.readouterr().out
        assert line.startswith(kernel)
        assert "% of the limit" in line
        assert f"us, {error} from it" in line


def _times(factor, oracle, *inputs):
    return jax.tree.map(lambda x: factor * x, oracle(*inputs))
