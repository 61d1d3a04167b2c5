// Products of small matrices by tensor cores, and the rounding of their factors, as PTX: C++ has no operators for them.
//
// PRODUCTS_TF32 or PRODUCTS_BF16 selects the format of the factors. They are rounded once, where they are loaded or
// published: TF32 to the nearest with ties away from zero (cvt.rna has no other mode), bfloat16 with ties to even. Sums
// are float32. A fragment is a lane's share of a matrix, as the PTX manual draws it for m16n8k8 and m16n8k16.
//
// Host code for the tests has its own version of this file (tests/host_cuda/mma_host.h).
#if defined(PRODUCTS_TF32) || defined(PRODUCTS_BF16)
#define MMA

#ifdef PRODUCTS_BF16
typedef unsigned short element_t;  // the bits of a bfloat16
#else
typedef word_t element_t;  // the bits of a float whose last 13 are zero
#endif

// Four elements that follow each other: what a lane loads at once.
struct alignas(4 * sizeof(element_t)) Piece {
    word_t word[sizeof(element_t)];
};

#ifndef HOST_CUDA
__device__ inline element_t rounded(float value) {
    element_t result;
#ifdef PRODUCTS_BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
#else
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
#endif
    return result;
}

// sums (16, 8) += a (16, 16) b (16, 8), by bfloat16; a0 has the upper eight rows of a, a1 the lower ones, each for the
// first (word 0) and last (word 1) eight columns.
#ifdef PRODUCTS_BF16
__device__ inline void mma(float (&sums)[4], const word_t (&a)[4], word_t b0, word_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
// sums (16, 8) += a (16, 8) b (8, 8), by TF32.
__device__ inline void mma(float (&sums)[4], const word_t (&a)[4], word_t b0, word_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// A weight, or zero. In PTX, because the compiler would compute the addresses of many ahead, and run out of registers.
__device__ inline float load_if(const float *from, bool there) {
    float value = 0;
    asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %2, 0;\n@there ld.global.f32 %0, [%1];\n}"
                 : "+f"(value) : "l"(from), "r"(unsigned(there)) : "memory");
    return value;
}

// What other blocks write: see exchange.cuh.
__device__ inline void load_shared_by_blocks(word_t (&to)[2], const void *from) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from) : "memory");
}

__device__ inline void load_shared_by_blocks(word_t (&to)[4], const void *from) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from) : "memory");
}

__device__ inline void store_shared_by_blocks(element_t *to, element_t value) {
#ifdef PRODUCTS_BF16
    asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to), "h"(value) : "memory");
#else
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
#endif
}

#ifdef CLUSTER
__device__ inline void store_to_block(element_t *mine, unsigned rank, element_t value) {
    const unsigned local = unsigned(__cvta_generic_to_shared(mine));
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
#ifdef PRODUCTS_BF16
    asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(remote), "h"(value) : "memory");
#else
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(value) : "memory");
#endif
}
#endif
#endif
#endif
