"""The largest of a step's logits, found on the GPU: what greedy and top-k choose from, in place of the whole row.

The usual way, in passes: every block keeps the KEPT largest of SLICE items, the next pass does so with what they kept,
until one block is left; 65,536 logits take two passes, 2 million three. Radix selection would read the row several
times, each time to the end before the next. A block sorts runs of KEPT in shared memory (bitonic: no branch depends on
the numbers) and then halves what is left: of one run that descends and one that ascends, the larger of each pair are
the KEPT largest of both. Nothing in it depends on how many threads a block has, so the same source runs on a host, one
thread to a block.

A logit and its id are one 64-bit number, so that among equals the first comes first, as in numpy's argmax; NaN stands
above infinity, as there. How many of those KEPT count, and that no more than those tie, is for `candidates` to say.
Like merino_edge.runtime.engines.kv_scatter_kernel's it is compiled when a plan opens; where the compiler is missing, rows come down.
Not run on a GPU yet.
"""

from __future__ import annotations

import math

import numpy as np

from merino_edge.runtime.engine import Candidates
from merino_edge.runtime.engines.cuda import Cuda

KEPT = 64
SLICE = 2048  # items of one block: 16 KB of shared memory
NAME = "keep_largest"
SOURCE = """
typedef unsigned long long Item;  // above: the logit, in an order of unsigned integers; below: ~id. 0: none

static __device__ Item packed(float logit, int id)
{
    const unsigned bits = __float_as_uint(logit);
    const unsigned order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
    return id < 0 ? 0 : (Item)order << 32 | ~(unsigned)id;
}

// One step of a bitonic sort: every pair `stride` apart in order, descending where its place has no bit `ascending`.
static __device__ void exchange(Item* items, int count, int stride, int ascending)
{
    for (int pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
        const int at = 2 * pair - (pair & (stride - 1));
        const Item first = items[at], second = items[at + stride];
        if ((first < second) == !(at & ascending)) {
            items[at] = second;
            items[at + stride] = first;
        }
    }
    __syncthreads();
}

// Of logits [count] and their ids (in the first pass their places), KEPT for each block, descending; id -1: no more.
extern "C" __global__ void keep_largest(
    const float* logits, const int* ids, float* largest, int* largest_ids, int count, int first_pass)
{
    __shared__ Item items[SLICE];
    for (int i = threadIdx.x; i < SLICE; i += blockDim.x) {
        const int at = blockIdx.x * SLICE + i;
        items[i] = at < count ? packed(logits[at], first_pass ? at : ids[at]) : 0;
    }
    __syncthreads();
    for (int run = 2; run < KEPT; run *= 2)
        for (int stride = run / 2; stride > 0; stride /= 2) exchange(items, SLICE, stride, run);
    for (int left = SLICE;; left /= 2) {
        // Runs of KEPT: those of the first half descend, those of the second ascend; the last one descends.
        const int half = left > KEPT ? left / 2 : KEPT;
        for (int stride = KEPT / 2; stride > 0; stride /= 2) exchange(items, left, stride, half);
        if (left == KEPT) break;
        for (int i = threadIdx.x; i < half; i += blockDim.x)
            if (items[i] < items[i + half]) items[i] = items[i + half];
        __syncthreads();
    }
    for (int i = threadIdx.x; i < KEPT; i += blockDim.x) {
        const unsigned order = items[i] >> 32;
        largest[blockIdx.x * KEPT + i] = __uint_as_float(order >> 31 ? order ^ 1u << 31 : ~order);
        largest_ids[blockIdx.x * KEPT + i] = ~(unsigned)items[i];
    }
}
""".replace("KEPT", str(KEPT)).replace("SLICE", str(SLICE))
THREADS = 512
POINTERS = 4  # of the arguments, the first ones; the others are 32-bit integers


class TopKKernel:
    """Of the logits of one plan; `queue` after a step, `candidates` once it is done."""

    def __init__(self, cuda: Cuda, logits: int, vocab_size: int) -> None:
        """`logits`: address of a step's [V]. Raises UnsupportedError where there is no compiler, or no memory."""
        self._cuda, self._kernel = cuda, cuda.compile(SOURCE, NAME)
        found = cuda.pinned((2, KEPT), np.int32)  # logits, ids
        self._found, self._copies = found, not cuda.unified
        self._found_at = cuda.allocate(found.nbytes) if self._copies else cuda.address_of(found)
        seen = min(vocab_size, KEPT)
        self._logits, self._ids = found[0, :seen].view(np.float32), found[1, :seen]
        self.most = seen - 1  # that `candidates` can be asked for: the last one shows whether ties go on
        self._passes: list[tuple[int, tuple[int, ...]]] = []  # (blocks, arguments)
        source, count, blocks = (logits, logits), vocab_size, 0  # (logits, ids); the first pass reads no ids
        while blocks != 1:
            blocks = math.ceil(count / SLICE)
            kept = blocks * KEPT
            target = self._found_at if blocks == 1 else cuda.allocate(2 * 4 * kept)
            first_pass = int(not self._passes)
            self._passes.append((blocks, (*source, target, target + 4 * kept, count, first_pass)))
            source, count = (target, target + 4 * kept), kept

    def queue(self) -> None:
        """Find the largest logits of the step that was queued before."""
        for blocks, arguments in self._passes:
            self._cuda.start(self._kernel, (blocks, 1), THREADS, arguments, POINTERS)
        if self._copies:
            self._cuda.to_host(self._found_at, self._found)

    def candidates(self, k: int) -> Candidates | None:
        """The `k` largest, up to `most`, and all that tie with the least of them. None where the row must say: more tie
        than were kept, or the largest is NaN or infinite."""
        logits, count = self._logits, k
        if not math.isfinite(logits[0]):
            return None
        while logits[count] == logits[k - 1]:
            count += 1
            if count == logits.size:  # more of them may follow
                return None
        ids = self._ids[:count].astype(np.int64)
        order = ids.argsort()
        return Candidates(logits[:count][order], ids[order])
