// Which arguments the kernels of ranges take, which kernel takes them, over how many blocks keys are split, and what workspace that wants. Host
// code without CUDA calls.
#pragma once

#include "choose.h"
#include "range_block.h"

namespace flamingo {

enum class RangeKernel { REFUSED, NOTHING, FP32, PREFILL, DECODE };

inline const char* name_of(RangeKernel kernel) {
    switch (kernel) {
        case RangeKernel::NOTHING: return "nothing";
        case RangeKernel::FP32: return "range_fp32";
        case RangeKernel::PREFILL: return "range";
        case RangeKernel::DECODE: return "range_decode";
        default: return nullptr;
    }
}

constexpr int64_t BLOCKS_WANTED = 512;    // that keep a large GPU busy; keys are split until there are so many
constexpr int64_t SLICES_AT_LEAST = 4;    // of 64 keys, of a block: below, joining costs what splitting saves

inline int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

// Queries that share a head of keys.
inline int64_t rows_of(const RangeArgs& args) { return int64_t(args.positions) * (args.heads / args.kv_heads); }
inline int64_t queries_of(const RangeArgs& args) { return int64_t(args.batch) * args.positions * args.heads; }

// Blocks of the kernel if keys are not split.
inline int64_t unsplit_blocks(const RangeArgs& args, RangeKernel kernel) {
    if (kernel == RangeKernel::FP32) return up(queries_of(args), WARPS);
    return up(rows_of(args), kernel == RangeKernel::DECODE ? ROW_TILE : WARPS * ROW_TILE) * args.batch * args.kv_heads;
}

inline int splits_of(const RangeArgs& args, RangeKernel kernel) {
    if (kernel != RangeKernel::DECODE && kernel != RangeKernel::PREFILL) return 1;
    const int64_t slices = int64_t(args.media) * up(args.keys, SLICE), blocks = unsplit_blocks(args, kernel);
    const int64_t wanted = blocks < BLOCKS_WANTED ? up(BLOCKS_WANTED, blocks) : 1, most = slices / SLICES_AT_LEAST;
    return int(wanted < most ? wanted : most > 1 ? most : 1);
}

inline RangeKernel range_choose(const RangeArgs& args) {
    const bool fp8 = args.kv_dtype == FLAMINGO_FLOAT8_E4M3;
    if (args.dtype != FLAMINGO_FLOAT32 && args.dtype != FLAMINGO_FLOAT16 && args.dtype != FLAMINGO_BFLOAT16) return RangeKernel::REFUSED;
    if (args.kv_dtype != args.dtype && !fp8) return RangeKernel::REFUSED;
    if (!fp8 && (args.k_scale || args.v_scale)) return RangeKernel::REFUSED;
    const int d = args.head_size;
    if (d != 32 && d != 64 && d != 80 && d != 96 && d != 128) return RangeKernel::REFUSED;
    if (args.batch < 0 || args.positions < 0 || args.heads < 1 || args.keys < 1 || args.media < 0 || args.bank_rows < 0) return RangeKernel::REFUSED;
    if (args.kv_heads < 1 || args.heads % args.kv_heads) return RangeKernel::REFUSED;
    if (args.batch == 0 || args.positions == 0) return RangeKernel::NOTHING;
    if (!args.q || !args.y || !args.phi || !args.first_media) return RangeKernel::REFUSED;
    const bool bank = args.media > 0 && args.bank_rows > 0;
    if (bank && (!args.k || !args.v || !args.media_rows)) return RangeKernel::REFUSED;
    for (const void* p : {args.q, args.k, args.v, static_cast<const void*>(args.y), static_cast<const void*>(args.media_rows),
                          static_cast<const void*>(args.phi), static_cast<const void*>(args.first_media), static_cast<const void*>(args.workspace)})
        if (!aligned(p)) return RangeKernel::REFUSED;
    const RangeKernel kernel = args.dtype == FLAMINGO_FLOAT32     ? RangeKernel::FP32
                               : rows_of(args) <= ROW_TILE        ? RangeKernel::DECODE
                                                                  : RangeKernel::PREFILL;
    if (splits_of(args, kernel) > 1 && !args.workspace) return RangeKernel::REFUSED;
    const int64_t blocks = unsplit_blocks(args, kernel) * splits_of(args, kernel);
    return blocks <= INT32_MAX && rows_of(args) <= INT32_MAX && up(queries_of(args), WARPS) <= INT32_MAX ? kernel : RangeKernel::REFUSED;
}

// With fewer than BLOCKS_WANTED blocks unsplit there are less than twice as many split; a block has at most 16 or 64 queries. Smaller sizes may
// mean more splits, so the bound is of all of them.
inline size_t range_workspace(const RangeArgs& args) {
    if (args.dtype == FLAMINGO_FLOAT32 || args.batch < 1 || args.positions < 1 || args.kv_heads < 1) return 0;
    if (int64_t(args.media) * up(args.keys, SLICE) < 2 * SLICES_AT_LEAST) return 0;  // too few keys to split
    const int64_t queries = rows_of(args) <= ROW_TILE ? ROW_TILE : WARPS * ROW_TILE;
    return size_t(2 * BLOCKS_WANTED * queries * (args.head_size + STATISTICS)) * sizeof(float);
}

}  // namespace flamingo
