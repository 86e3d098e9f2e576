"""The top-k kernel's source, compiled for the host, against NumPy and the sampler.

ThreadSanitizer checks that no thread reads what another still writes, where the compiler has it. tests/gpu runs the
kernel on a GPU.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_driver import COMPILER, load_driver
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engine import Candidates
from merino_edge.runtime.engines.topk_kernel import NAME, SLICE, SOURCE, TOP_K, TopKKernel
from merino_edge.runtime.sampling import Sampler
from merino_edge.runtime.sampling_parameters import Sampling

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler")
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38)


def topk(logits: np.ndarray, k: int) -> Candidates | None:
    driver = load_driver()
    if driver is None:
        pytest.skip("this machine has NVIDIA's driver: tests/gpu runs the kernel there")
    driver.add_kernel(SOURCE, NAME)
    with contextlib.closing(Cuda()) as cuda, cuda.active():
        address = cuda.allocate(logits.nbytes)
        cuda.to_device(logits, address)
        kernel = TopKKernel(cuda, address, logits.size)
        assert kernel.max_k == min(logits.size, TOP_K) - 1
        kernel.queue()
        cuda.synchronize()
        return kernel.candidates(k)


def random_logits(size: int, values: int, specials: list[float], seed: int) -> np.ndarray:
    """Logits with `values` different values, some of them replaced by `specials`."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(values).astype(np.float32)[rng.integers(values, size=size)]
    logits[rng.integers(size, size=len(specials))] = specials
    return logits


@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.integers(2, 3 * SLICE), st.sampled_from((SLICE, SLICE + 1, 49_152, 50_257, 40 * SLICE))),
    values=st.sampled_from((2, 20, 1000, 10**6)),
    specials=st.lists(st.sampled_from(SPECIAL), max_size=5),
    k=st.integers(1, TOP_K - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_finds_what_sorting_finds(size: int, values: int, specials: list[float], k: int, seed: int) -> None:
    k, logits = min(k, size - 1), random_logits(size, values, specials, seed)
    result = topk(logits, k)
    expected = np.flatnonzero(logits >= np.sort(logits)[-k])
    fits = np.isfinite(logits.max()) and expected.size < min(size, TOP_K)  # max is NaN where one is
    assert (result is not None) == fits
    if result is not None:
        assert result.ids is not None and result.ids.dtype == np.int64
        np.testing.assert_array_equal(result.ids, expected)
        np.testing.assert_array_equal(result.logits.view(np.int32), logits[expected].view(np.int32))


@settings(max_examples=150, deadline=None)
@given(
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        top_k=st.integers(1, TOP_K - 1),
        top_p=st.floats(0, 1),
        min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
        typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
        greedy=st.booleans(),
        seed=st.integers(0, 9),
    ),
    size=st.integers(TOP_K, 3 * SLICE),
    values=st.sampled_from((100, 1000, 10**6)),
    specials=st.lists(st.sampled_from((-np.inf, 0.0, -0.0)), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sampler_draws_from_it_what_it_draws_from_the_row(
    sampling: Sampling, size: int, values: int, specials: list[float], seed: int
) -> None:
    logits = random_logits(size, values, specials, seed)
    assert sampling.required_topk is not None
    result = topk(logits, sampling.required_topk)
    if result is None:
        return
    row_sampler, topk_sampler = Sampler(sampling), Sampler(sampling)
    assert result.ids is not None
    for _ in range(8):
        assert result.ids[topk_sampler(result.logits, [])] == row_sampler(logits, [])


@pytest.mark.parametrize(
    ("sampling", "required"),
    [
        (Sampling(), 40),
        (Sampling(greedy=True), 1),
        (Sampling(temperature=0, top_k=0), 1),
        (Sampling(top_k=0), None),
        (Sampling(top_k=7, min_p=0.1, typical_p=0.5), 7),
        (Sampling(greedy=True, repetition_penalty=1.1), None),
        (Sampling(frequency_penalty=0.1), None),
        (Sampling(presence_penalty=-0.1), None),
        (Sampling(logit_bias={3: 1.0}), None),
    ],
)
def test_how_many_of_the_largest_are_required(sampling: Sampling, required: int | None) -> None:
    assert sampling.required_topk == required


THREADED = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define THREADS 64  // more than half a run, so that one pair is not always handled by the same thread
#define __global__
#define __device__
#define __shared__ static
// Two barriers in turn. With one, a thread that wakes up late would seem to have waited for later work of others.
static pthread_barrier_t barriers[2];
static thread_local int waits;
#define __syncthreads() pthread_barrier_wait(&barriers[waits++ & 1])
static unsigned __float_as_uint(float number) { unsigned bits; memcpy(&bits, &number, 4); return bits; }
static float __uint_as_float(unsigned bits) { float number; memcpy(&number, &bits, 4); return number; }
static struct { int x; } blockIdx = {0}, blockDim = {THREADS};
static thread_local struct { int x; } threadIdx;
KERNEL
static float logits[SLICE - 3], largest[TOP_K];
static int ids[TOP_K];
static void* thread(void* number)
{
    threadIdx.x = (int)(long)number;
    topk_logits(logits, 0, largest, ids, SLICE - 3, 1);
    return 0;
}
int main()
{
    for (int i = 0; i < SLICE - 3; ++i) logits[i] = (float)((i * 7919L) % (SLICE - 3));  // each number once
    pthread_t threads[THREADS];
    for (int i = 0; i < 2; ++i) pthread_barrier_init(&barriers[i], 0, THREADS);
    for (long i = 0; i < THREADS; ++i) pthread_create(&threads[i], 0, thread, (void*)i);
    for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], 0);
    for (int i = 0; i < TOP_K; ++i)
        if (largest[i] != (float)(SLICE - 4 - i) || logits[ids[i]] != largest[i]) return 1;
    return 0;
}
"""


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_threads_of_a_block_wait_for_each_other(tmp_path: Path, missing: int | None) -> None:
    """ThreadSanitizer finds no race, but finds one if any of the kernel's barriers is removed."""
    parts = SOURCE.split("__syncthreads();")
    assert len(parts) == 4
    barriers = ["" if number == missing else "__syncthreads();" for number in range(3)]
    kernel = parts[0] + "".join(wait + part for wait, part in zip(barriers, parts[1:], strict=True))
    program = THREADED.replace("KERNEL", kernel).replace("TOP_K", str(TOP_K)).replace("SLICE", str(SLICE))
    (tmp_path / "threads.cpp").write_text(program)
    built = [str(COMPILER), "-fsanitize=thread", "-O1", "-pthread", "-o", str(tmp_path / "threads")]
    if subprocess.run([*built, str(tmp_path / "threads.cpp")], capture_output=True).returncode:
        pytest.skip("this compiler has no ThreadSanitizer")
    run = subprocess.run([str(tmp_path / "threads")], capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run here")
    assert ("data race" in run.stderr) == (missing is not None), run.stderr
    assert missing is not None or run.returncode == 0
