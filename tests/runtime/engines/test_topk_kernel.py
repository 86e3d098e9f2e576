"""The kernel that finds a step's largest logits: its own source, compiled for the host, against NumPy and the sampler,
and, where the compiler can watch threads, that none reads what another still writes. tests/gpu runs it on a GPU."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.stand_in_gpu import COMPILER, HostMemory
from merino_edge.runtime.engine import Candidates
from merino_edge.runtime.engines.topk_kernel import KEPT, SLICE, SOURCE, TopKKernel
from merino_edge.runtime.sampling import Sampler, Sampling

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler")
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38)


def selected(logits: np.ndarray, k: int) -> Candidates | None:
    cuda = HostMemory()
    with contextlib.closing(cuda):
        kernel = TopKKernel(cuda, logits.ctypes.data, logits.size)  # type: ignore[arg-type]
        assert kernel.most == min(logits.size, KEPT) - 1
        kernel.queue()
        return kernel.candidates(k)


def random_logits(size: int, values: int, specials: list[float], seed: int) -> np.ndarray:
    """Of so many different values, some of which are replaced."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(values).astype(np.float32)[rng.integers(values, size=size)]
    logits[rng.integers(size, size=len(specials))] = specials
    return logits


@settings(max_examples=150, deadline=None)
@given(
    size=st.one_of(st.integers(2, 3 * SLICE), st.sampled_from((SLICE, SLICE + 1, 49_152, 50_257, 40 * SLICE))),
    values=st.sampled_from((2, 20, 1000, 10**6)),
    specials=st.lists(st.sampled_from(SPECIAL), max_size=5),
    k=st.integers(1, KEPT - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_it_finds_what_sorting_finds(size: int, values: int, specials: list[float], k: int, seed: int) -> None:
    k, logits = min(k, size - 1), random_logits(size, values, specials, seed)
    found = selected(logits, k)
    expected = np.flatnonzero(logits >= np.sort(logits)[-k])
    fits = np.isfinite(logits.max()) and expected.size < min(size, KEPT)  # max is NaN where one is
    assert (found is not None) == fits
    if found is not None:
        assert found.ids is not None and found.ids.dtype == np.int64
        np.testing.assert_array_equal(found.ids, expected)
        np.testing.assert_array_equal(found.logits.view(np.int32), logits[expected].view(np.int32))


@settings(max_examples=150, deadline=None)
@given(
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 5),
        top_k=st.integers(1, KEPT - 1),
        top_p=st.floats(0, 1),
        min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
        typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
        greedy=st.booleans(),
        seed=st.integers(0, 9),
    ),
    size=st.integers(KEPT, 3 * SLICE),
    values=st.sampled_from((100, 1000, 10**6)),
    specials=st.lists(st.sampled_from((-np.inf, 0.0, -0.0)), max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_sampler_draws_from_it_what_it_draws_from_the_row(
    sampling: Sampling, size: int, values: int, specials: list[float], seed: int
) -> None:
    logits = random_logits(size, values, specials, seed)
    assert sampling.required_topk is not None
    found = selected(logits, sampling.required_topk)
    if found is None:
        return
    of_the_row, of_the_largest = Sampler(sampling), Sampler(sampling)
    assert found.ids is not None
    for _ in range(8):
        assert found.ids[of_the_largest(found.logits, [])] == of_the_row(logits, [])


@pytest.mark.parametrize(
    ("sampling", "largest"),
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
def test_how_many_of_the_largest_decide(sampling: Sampling, largest: int | None) -> None:
    assert sampling.required_topk == largest


THREADED = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define THREADS 64  // more than a run's half, so that a pair is not always the same thread's
#define __global__
#define __device__
#define __shared__ static
// Two, in turn: by one alone, who wakes up late would seem to have waited for what others did after it.
static pthread_barrier_t barriers[2];
static thread_local int waits;
#define __syncthreads() pthread_barrier_wait(&barriers[waits++ & 1])
static unsigned __float_as_uint(float number) { unsigned bits; memcpy(&bits, &number, 4); return bits; }
static float __uint_as_float(unsigned bits) { float number; memcpy(&number, &bits, 4); return number; }
static struct { int x; } blockIdx = {0}, blockDim = {THREADS};
static thread_local struct { int x; } threadIdx;
KERNEL
static float logits[SLICE - 3], largest[KEPT];
static int ids[KEPT];
static void* thread(void* number)
{
    threadIdx.x = (int)(long)number;
    keep_largest(logits, 0, largest, ids, SLICE - 3, 1);
    return 0;
}
int main()
{
    for (int i = 0; i < SLICE - 3; ++i) logits[i] = (float)((i * 7919L) % (SLICE - 3));  // each number once
    pthread_t threads[THREADS];
    for (int i = 0; i < 2; ++i) pthread_barrier_init(&barriers[i], 0, THREADS);
    for (long i = 0; i < THREADS; ++i) pthread_create(&threads[i], 0, thread, (void*)i);
    for (int i = 0; i < THREADS; ++i) pthread_join(threads[i], 0);
    for (int i = 0; i < KEPT; ++i)
        if (largest[i] != (float)(SLICE - 4 - i) || logits[ids[i]] != largest[i]) return 1;
    return 0;
}
"""


@pytest.mark.parametrize("missing", [None, 0, 1, 2])
def test_threads_of_a_block_wait_for_each_other(tmp_path: Path, missing: int | None) -> None:
    """By ThreadSanitizer; with one of the kernel's barriers taken out, it must object."""
    parts = SOURCE.split("__syncthreads();")
    assert len(parts) == 4
    kept = ["" if number == missing else "__syncthreads();" for number in range(3)]
    kernel = parts[0] + "".join(wait + part for wait, part in zip(kept, parts[1:], strict=True))
    program = THREADED.replace("KERNEL", kernel).replace("KEPT", str(KEPT)).replace("SLICE", str(SLICE))
    (tmp_path / "threads.cpp").write_text(program)
    built = [str(COMPILER), "-fsanitize=thread", "-O1", "-pthread", "-o", str(tmp_path / "threads")]
    if subprocess.run([*built, str(tmp_path / "threads.cpp")], capture_output=True).returncode:
        pytest.skip("this compiler does not watch threads")
    run = subprocess.run([str(tmp_path / "threads")], capture_output=True, text=True)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run here")
    assert ("data race" in run.stderr) == (missing is not None), run.stderr
    assert missing is not None or run.returncode == 0
