// The instructions that a thread of the kernels uses, on sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include "mma_block.h"

namespace flamingo {

struct CudaMachine {
    uint32_t shared;  // address of the block's shared memory
    unsigned number;  // of the thread
    int warp_number;  // from lane 0, by which the compiler sees that a warp's lanes agree on it

    __device__ __forceinline__ explicit CudaMachine(const void* memory)
        : shared(uint32_t(__cvta_generic_to_shared(memory))), number(threadIdx.x), warp_number(__shfl_sync(~0u, threadIdx.x / WARP, 0)) {}

    __device__ __forceinline__ int thread() const { return number % THREADS; }
    __device__ __forceinline__ int lane() const { return number % WARP; }
    __device__ __forceinline__ int warp() const { return warp_number; }
    // What was computed from the thread's number is to be computed anew: dozens of addresses kept across a loop would cost spills.
    __device__ __forceinline__ void forget() { asm volatile("" : "+r"(number)); }
    __device__ __forceinline__ void sync() { __syncthreads(); }

    template <class X>
    __device__ __forceinline__ X shuffle(X x, int lane) { return __shfl_sync(~0u, x, lane); }
    template <class X>
    __device__ __forceinline__ X shuffle_xor(X x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
    __device__ __forceinline__ uint64_t ballot(bool x) { return __ballot_sync(~0u, x); }
    __device__ __forceinline__ int first_bit(uint64_t x) { return __ffsll(static_cast<long long>(x)) - 1; }

    __device__ __forceinline__ int64_t load_i64(const int64_t* p) { return __ldg(reinterpret_cast<const long long*>(p)); }
    __device__ __forceinline__ float load_f32(const float* p) { return __ldg(p); }
    __device__ __forceinline__ float load_e4m3(const uint8_t* p) {
        float low, high;
        halves(widen(Half{}, __ldg(p)), low, high);
        return low;
    }
    __device__ __forceinline__ void load16(const char* p, uint32_t (&x)[4]) {
        const uint4 y = __ldg(reinterpret_cast<const uint4*>(p));
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    }
    __device__ __forceinline__ void load8(const char* p, uint32_t& low, uint32_t& high) {
        const uint2 y = __ldg(reinterpret_cast<const uint2*>(p));
        low = y.x, high = y.y;
    }
    __device__ __forceinline__ void store16(char* p, const uint32_t (&x)[4]) { *reinterpret_cast<uint4*>(p) = make_uint4(x[0], x[1], x[2], x[3]); }
    __device__ __forceinline__ void store8(char* p, uint32_t low, uint32_t high) { *reinterpret_cast<uint2*>(p) = make_uint2(low, high); }
    __device__ __forceinline__ void store_f32(float* p, float x) { *p = x; }

    // Copies 16 bytes to shared memory in the background, or zeros.
    __device__ __forceinline__ void copy16(uint32_t to, const char* from, bool there) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared + to), "l"(from), "r"(there ? 16 : 0) : "memory");
    }
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    // Until all groups of this thread's copies but the newest are done.
    __device__ __forceinline__ void wait_for_older() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

    __device__ __forceinline__ void store_shared(uint32_t to, float x, float y) {
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared + to), "f"(x), "f"(y) : "memory");
    }
    __device__ __forceinline__ void load_shared(uint32_t from, float& x, float& y) {
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(shared + from) : "memory");
    }

    __device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&r)[4]) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared + from) : "memory");
    }
    __device__ __forceinline__ void load_matrices(uint32_t from, uint32_t (&r)[2]) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared + from) : "memory");
    }
    __device__ __forceinline__ void load_matrices_transposed(uint32_t from, uint32_t (&r)[4]) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared + from) : "memory");
    }
    __device__ __forceinline__ void load_matrices_transposed(uint32_t from, uint32_t (&r)[2]) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared + from) : "memory");
    }

    __device__ __forceinline__ void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    __device__ __forceinline__ void mma(Bfloat, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }

    // Two numbers of 16 bits in a register, the first in the low half.
    __device__ __forceinline__ uint32_t pack(Half, float low, float high) {
        uint32_t r;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    __device__ __forceinline__ uint32_t pack(Bfloat, float low, float high) {
        uint32_t r;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
    __device__ __forceinline__ uint32_t multiply(Half, uint32_t x, uint32_t y) {
        uint32_t r;
        asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(y));
        return r;
    }

    // Two numbers of FP8 E4M3 (low 16 bits) in 16 bits each. Both formats hold every one of them.
    __device__ __forceinline__ uint32_t widen(Half, uint32_t two) {
#if __CUDA_ARCH__ >= 890
        uint32_t r;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(uint16_t(two)));
        return r;
#else
        return widen_by_bits(*this, two);
#endif
    }
    __device__ __forceinline__ uint32_t widen(Bfloat, uint32_t two) {
        float low, high;
        halves(widen(Half{}, two), low, high);
        return pack(Bfloat{}, low, high);
    }
    __device__ __forceinline__ void halves(uint32_t two, float& low, float& high) {
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(two));
    }

    __device__ __forceinline__ float exp2(float x) {
        float r;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
        return r;
    }
    __device__ __forceinline__ float reciprocal(float x) {  // of normal numbers, to the last bit but one
        float r;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
        return r;
    }
    __device__ __forceinline__ float max(float x, float y) { return fmaxf(x, y); }
    __device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
};

}  // namespace flamingo
