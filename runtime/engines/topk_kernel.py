"""Top-k kernel: finds the largest logits of a step on the GPU, so that the whole row is not copied to the host.

Each block keeps the TOP_K largest of SLICE items. The next pass does the same with what was kept, until one block is
left: 65,536 logits take two passes, 2 million take three. Radix selection would read the row several times. A block
sorts runs of TOP_K items in shared memory (bitonic sort, no branch depends on the data). It then halves what is left:
the larger items of each pair of a descending and an ascending run are the largest of both. The result does not depend
on the number of threads in a block, so tests run the same source on a host. Like the KV scatter kernel it is compiled
when a plan opens; without the compiler the whole row is copied. Not run on a GPU yet.
"""

from __future__ import annotations

import math

import numpy as np

from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engine import Candidates

TOP_K = 64
SLICE = 2048  # items of one block: 16 KB of shared memory
NAME = "topk_logits"
# A logit and its id are packed into one 64-bit number, so that of equal logits the first id comes first, and NaN is
# above infinity. Both are as in numpy's argmax. `TopKKernel.candidates` decides how many of the TOP_K are valid.
SOURCE = """
typedef unsigned long long Item;  // high bits: the logit, in the order of unsigned integers; low bits: ~id. 0: none

static __device__ Item packed(float logit, int id)
{
    const unsigned bits = __float_as_uint(logit);
    const unsigned order = logit != logit ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
    return id < 0 ? 0 : (Item)order << 32 | ~(unsigned)id;
}

// One step of a bitonic sort: order all pairs `stride` apart, descending where the index lacks the bit `ascending`.
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

// logits [count] and their ids (the indices in the first pass) -> TOP_K of each block, descending; id -1: no more.
extern "C" __global__ void topk_logits(
    const float* logits, const int* ids, float* largest, int* largest_ids, int count, int first_pass)
{
    __shared__ Item items[SLICE];
    for (int i = threadIdx.x; i < SLICE; i += blockDim.x) {
        const int at = blockIdx.x * SLICE + i;
        items[i] = at < count ? packed(logits[at], first_pass ? at : ids[at]) : 0;
    }
    __syncthreads();
    for (int run = 2; run < TOP_K; run *= 2)
        for (int stride = run / 2; stride > 0; stride /= 2) exchange(items, SLICE, stride, run);
    for (int left = SLICE;; left /= 2) {
        // Runs of TOP_K items: descending in the first half, ascending in the second half; the last run descends.
        const int half = left > TOP_K ? left / 2 : TOP_K;
        for (int stride = TOP_K / 2; stride > 0; stride /= 2) exchange(items, left, stride, half);
        if (left == TOP_K) break;
        for (int i = threadIdx.x; i < half; i += blockDim.x)
            if (items[i] < items[i + half]) items[i] = items[i + half];
        __syncthreads();
    }
    for (int i = threadIdx.x; i < TOP_K; i += blockDim.x) {
        const unsigned order = items[i] >> 32;
        largest[blockIdx.x * TOP_K + i] = __uint_as_float(order >> 31 ? order ^ 1u << 31 : ~order);
        largest_ids[blockIdx.x * TOP_K + i] = ~(unsigned)items[i];
    }
}
""".replace("TOP_K", str(TOP_K)).replace("SLICE", str(SLICE))
THREADS = 512
POINTERS = 4  # the first arguments are pointers, the others are 32-bit integers


class TopKKernel:
    """The kernel for the logits of one plan. Call `queue` in a step, and `candidates` once the step is done.

    `max_k` is the largest k of `candidates`. It is one less than the kernel keeps: the last one shows whether there
    are more ties.
    """

    def __init__(self, cuda: Cuda, logits: int, vocab_size: int) -> None:
        """`logits` is the address of a step's logits [V]. Raises UnsupportedError without a compiler or memory."""
        self._cuda, self._kernel = cuda, cuda.compile(SOURCE, NAME)
        results = cuda.pinned((2, TOP_K), np.int32)  # logits, ids
        self._results, self._copies = results, not cuda.unified
        self._results_address = cuda.allocate(results.nbytes) if self._copies else cuda.address_of(results)
        kept = min(vocab_size, TOP_K)
        self._logits, self._ids = results[0, :kept].view(np.float32), results[1, :kept]
        self.max_k = kept - 1
        self._passes: list[tuple[int, tuple[int, ...]]] = []  # (blocks, arguments)
        source, count, blocks = (logits, logits), vocab_size, 0  # (logits, ids); the first pass reads no ids
        while blocks != 1:
            blocks = math.ceil(count / SLICE)
            kept = blocks * TOP_K
            target = self._results_address if blocks == 1 else cuda.allocate(2 * 4 * kept)
            first_pass = int(not self._passes)
            self._passes.append((blocks, (*source, target, target + 4 * kept, count, first_pass)))
            source, count = (target, target + 4 * kept), kept

    def queue(self) -> None:
        """Queue all passes after a step's inference."""
        for blocks, arguments in self._passes:
            self._cuda.start(self._kernel, (blocks, 1), THREADS, arguments, POINTERS)
        if self._copies:
            self._cuda.to_host(self._results_address, self._results)

    def candidates(self, k: int) -> Candidates | None:
        """The `k` largest logits, k at most `max_k`, and all logits equal to the smallest of those.

        Returns None where the whole row is needed: more logits tie than were kept, or the largest is not finite.
        """
        logits, count = self._logits, k
        if not math.isfinite(logits[0]):
            return None
        while logits[count] == logits[k - 1]:
            count += 1
            if count == logits.size:  # there may be more of them
                return None
        ids = self._ids[:count].astype(np.int64)
        order = ids.argsort()
        return Candidates(logits[:count][order], ids[order])
