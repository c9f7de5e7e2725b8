"""all_reduce_norm: the interpreted kernel, with its assembly acted out; the sizes it is for; what it lowers to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exchange_cases import CASES, check
from nanovllm_jax.kernels import Peers, exchange
from test_lowering import PALLAS, custom_calls, ints, lowered_for_cuda


class Memory:
    """Devices' memory, by address, and what the kernel's assembly does with it. Who would wait for ever fails."""

    def __init__(self):
        self.arrays = {}

    def device(self, contents):
        address = (len(self.arrays) + 3) << 31  # more than 32 bits, with all of them in use
        self.arrays[address] = contents.copy().view(np.uint8)
        return address, jnp.zeros(len(contents), jnp.int32), lambda: self.arrays[address].view(np.int32)

    def assembly(self, code, dtype, pack=1, **args):
        [shape] = {arg.shape for arg in args.values()}

        def act(**args):
            args = {name: np.asarray(arg) for name, arg in args.items()}
            out = np.array(args.get("data", np.zeros(shape)), dtype)
            for i in range(0, len(out), pack):
                at = {name: arg[i] for name, arg in args.items()}
                if at["offset"] >= 0:
                    base = (int(at["high"]) << 32) + int(np.uint32(at["low"]))
                    out[i : i + pack] = self.access(code, self.arrays[base], at, out[i : i + pack])
            return out

        return jax.pure_callback(act, jax.ShapeDtypeStruct(shape, dtype), **args)

    def access(self, code, array, at, data):
        size = 16 if code in (exchange.SEND, exchange.RECEIVE) else 4
        words = array[at["offset"] : at["offset"] + size].view(np.uint32)
        if code == exchange.READ_COUNTER:
            return words.view(np.int32)
        if code == exchange.SET_COUNTER:
            words[:] = at["flag"].view(np.uint32)
            return data
        if code == exchange.SEND:
            words[::2], words[1::2] = data.view(np.uint32), at["flag"].view(np.uint32)
            return data
        assert code == exchange.RECEIVE
        np.testing.assert_array_equal(words[1::2], at["flag"].view(np.uint32))
        return words[::2].copy().view(data.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device_of_several(case, monkeypatch):
    memory = Memory()
    monkeypatch.setattr(exchange, "by_assembly", memory.assembly)
    check(memory.device, *case, interpret=True)


def test_which_rows_it_is_for():
    """As many as 4 MiB sent to the others are; none of an odd size, or too short for a warp's threads."""
    assert [exchange.capacity(devices, 4096, 2) for devices in (1, 2, 4, 8, 16)] == [0, 512, 170, 73, 0]
    assert [exchange.capacity(2, features, 4) for features in (1024, 1028, 256, 128)] == [1024, 0, 4096, 0]
    assert exchange.memory_words(8, 4096, 2) < 2**31 // 4  # offsets are int32 numbers of bytes


@pytest.mark.parametrize(("features", "parts", "dtype"), [(4096, 1, jnp.bfloat16), (2560, 4, jnp.float16)])
def test_it_lowers_to_one_kernel(features, parts, dtype):
    x, gain = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((16, features), (features,)))
    delta = jax.ShapeDtypeStruct((parts, 16, features), dtype if parts == 1 else jnp.float32)
    peers = Peers(ints(1, 9), ints(exchange.memory_words(4, features, 2)))
    f = functools.partial(exchange.all_reduce_norm, eps=1e-6)
    assert custom_calls(lowered_for_cuda(f, x, delta, gain, peers)) == [PALLAS]
    with pytest.raises(AssertionError, match="past its end"):
        jax.eval_shape(f, jax.ShapeDtypeStruct((1000, features), dtype), delta, gain, peers)
    with pytest.raises(AssertionError, match="for other rows"):
        jax.eval_shape(f, x, delta, gain, peers._replace(memory=ints(5)))
