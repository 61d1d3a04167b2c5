// The tests' version of kernels/cuda/mma.cuh: tensor cores by the maps of the PTX manual, lane by lane.
//
// An instruction is a meeting of the warp: each lane offers its fragments, and computes its share of the result from
// theirs. A kernel whose fragments are not laid out so gets a wrong product. Bits that the format does not have are cut
// off, as the hardware does: a kernel that does not round shows.
#pragma once
#if defined(PRODUCTS_TF32) || defined(PRODUCTS_BF16)
#ifdef PRODUCTS_BF16
#define ELEMENT uint16_t
#else
#define ELEMENT uint32_t
#endif

namespace host_cuda {
inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The fragments that all lanes of the warp offer, once each has.
struct Fragments {
    const Fiber *lanes;
    int parity;
    const uint32_t *of(int lane) const { return lanes[lane].fragments[parity]; }
};
inline Fragments offer(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Block &mine = here();
    Fiber &self = mine.fibers[mine.current];
    const int parity = self.products++ % 2;  // those of the product before are read until all have met again
    std::copy(a, a + 4, self.fragments[parity]);
    self.fragments[parity][4] = b0, self.fragments[parity][5] = b1;
    const size_t warp = mine.current / warpSize * warpSize;
    mine.wait(State::at_warp_barrier, ~0u);
    return {&mine.fibers[warp], parity};
}
}  // namespace host_cuda

inline ELEMENT rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
#ifdef PRODUCTS_BF16
    return value != value ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
    return value != value ? 0x7fffe000u : (bits + 0x1000) & 0xffffe000u;
#endif
}

// sums (16, 8) += A B. Lane 4 g + m has rows g and g + 8 of A, column g of B, and columns 2 m and 2 m + 1 of the sums.
inline void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using namespace host_cuda;
    const Fragments fragments = offer(a, b0, b1);
    const int group = lane() / 4, member = lane() % 4;
    for (int n = 0; n < 4; ++n) {
        const int lower = n / 2, column = member * 2 + n % 2;
#ifdef PRODUCTS_BF16
        for (int k = 0; k < 16; ++k) {
            const int of = k % 8 / 2, shift = k % 2 ? 0 : 16;  // the even one is the lower half of a word
            const uint32_t left = fragments.of(group * 4 + of)[lower + k / 8 * 2] << shift;
            const uint32_t right = fragments.of(column * 4 + of)[4 + k / 8] << shift;
            sums[n] = std::fma(as_float(left & 0xffff0000u), as_float(right & 0xffff0000u), sums[n]);
        }
#else
        for (int k = 0; k < 8; ++k) {
            const uint32_t left = fragments.of(group * 4 + k % 4)[lower + k / 4 * 2];
            const uint32_t right = fragments.of(column * 4 + k % 4)[4 + k / 4];
            sums[n] = std::fma(as_float(left & 0xffffe000u), as_float(right & 0xffffe000u), sums[n]);
        }
#endif
    }
}

inline float load_if(const float *from, bool there) { return there ? *from : 0.0f; }

inline void store_shared_by_blocks(ELEMENT *to, ELEMENT value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }

template <size_t N> void load_shared_by_blocks(uint32_t (&to)[N], const void *from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(to)) throw std::runtime_error("a vector that is not aligned");
    for (size_t k = 0; k < N; ++k) to[k] = __atomic_load_n(static_cast<const uint32_t *>(from) + k, __ATOMIC_RELAXED);
}

#ifdef CLUSTER
inline void store_to_block(ELEMENT *mine, unsigned rank, ELEMENT value) {
    using namespace host_cuda;
    float *base = launched->memory[blockIdx.x / BLOCKS * BLOCKS + rank];
    if (!base) throw std::runtime_error("a write to a block that has not begun, or has ended");
    store_shared_by_blocks(reinterpret_cast<ELEMENT *>(base) + (mine - reinterpret_cast<ELEMENT *>(dynamic_shared)), value);
}
#endif
#endif
