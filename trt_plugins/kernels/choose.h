// Which arguments the kernels take, and which kernel takes them. Host code without CUDA calls.
#pragma once

#include "mma_block.h"

namespace flamingo {

enum class Kernel { REFUSED, NOTHING, FP32, PREFILL, PREFILL_SLICED, DECODE };

inline const char* name_of(Kernel kernel) {
    switch (kernel) {
        case Kernel::NOTHING: return "nothing";
        case Kernel::FP32: return "fp32";
        case Kernel::PREFILL: return "prefill";
        case Kernel::PREFILL_SLICED: return "prefill_sliced";
        case Kernel::DECODE: return "decode";
        default: return nullptr;
    }
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Blocks of THREADS threads that the kernel wants; `positions`: of a block of the tensor core kernels.
inline int64_t blocks_of(const Args& args, Kernel kernel) {
    if (kernel == Kernel::FP32) return (int64_t(args.batch) * args.positions * args.heads + WARPS - 1) / WARPS;
    const int64_t positions = kernel == Kernel::DECODE ? ROW_TILE : WARPS * ROW_TILE;
    return (args.positions + positions - 1) / positions * args.batch * args.heads;
}

inline Kernel choose(const Args& args) {
    const bool fp8 = args.kv_dtype == FLAMINGO_FLOAT8_E4M3;
    if (args.dtype != FLAMINGO_FLOAT32 && args.dtype != FLAMINGO_FLOAT16 && args.dtype != FLAMINGO_BFLOAT16) return Kernel::REFUSED;
    if (args.kv_dtype != args.dtype && !fp8) return Kernel::REFUSED;
    if (!fp8 && (args.k_scale || args.v_scale)) return Kernel::REFUSED;
    const int d = args.head_size;
    if (d != 32 && d != 64 && d != 80 && d != 96 && d != 128) return Kernel::REFUSED;
    if (args.batch < 0 || args.positions < 0 || args.heads < 1 || args.latents < 1 || args.media < 0 || args.bank_rows < 0) return Kernel::REFUSED;
    if (args.batch == 0 || args.positions == 0) return Kernel::NOTHING;
    if (!args.q || !args.y || !args.phi || !aligned(args.q) || !aligned(args.y) || !aligned(args.phi)) return Kernel::REFUSED;
    const bool bank = args.media > 0 && args.bank_rows > 0;
    if (bank && (!args.k || !args.v || !args.media_rows)) return Kernel::REFUSED;
    if (!aligned(args.k) || !aligned(args.v) || !aligned(args.media_rows)) return Kernel::REFUSED;
    const Kernel kernel = args.dtype == FLAMINGO_FLOAT32  ? Kernel::FP32
                          : args.positions <= ROW_TILE    ? Kernel::DECODE
                          : args.latents <= SLICE         ? Kernel::PREFILL
                                                          : Kernel::PREFILL_SLICED;
    return blocks_of(args, kernel) <= INT32_MAX ? kernel : Kernel::REFUSED;
}

}  // namespace flamingo
