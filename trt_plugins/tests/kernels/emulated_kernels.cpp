// The kernels' C interface on a CPU, for tests that drive it as a host of the kernels does: each launch runs all of its blocks in the emulator
// before it returns. One head size, so that it compiles in seconds; others are refused as a launch without a kernel would be.
#include <cstdio>

#include "choose.h"
#include "emulator.h"
#include "fp32_warp.h"
#include "range_choose.h"
#include "range_fp32_warp.h"

#ifndef HEAD_SIZE
#define HEAD_SIZE 32
#endif

namespace {

using namespace flamingo;

size_t bytes_of(flamingo_dtype dtype) {
    return dtype == FLAMINGO_FLOAT32 ? 4 : dtype == FLAMINGO_FLOAT8_E4M3 ? 1 : 2;
}

emulation::Memory memory_of(const Args& args) {
    emulation::Memory memory;
    const size_t queries = size_t(args.batch) * args.positions * args.heads * args.head_size * bytes_of(args.dtype);
    const size_t bank = size_t(args.bank_rows) * args.heads * args.latents * args.head_size * bytes_of(args.kv_dtype);
    memory.readable(args.q, queries);
    memory.readable(args.k, bank);
    memory.readable(args.v, bank);
    memory.readable(args.media_rows, size_t(args.batch) * args.media * 8);
    memory.readable(args.phi, size_t(args.batch) * args.positions * 8);
    if (args.k_scale) memory.readable(args.k_scale, 4);
    if (args.v_scale) memory.readable(args.v_scale, 4);
    memory.result(args.y, queries);
    return memory;
}

template <class Body>
void run(const Args& args, Kernel kernel, int shared_bytes, const Body& body) {
    static std::mt19937 random(1);
    emulation::Memory memory = memory_of(args);
    for (int64_t block = 0; block < blocks_of(args, kernel); ++block) {
        emulation::Block threads(memory, shared_bytes, random);
        threads.run([&](emulation::Machine& machine) { body(machine, block); });
    }
    memory.all_written();
}

template <class Shape>
void run_shape(const Args& args, Kernel kernel) {
    run(args, kernel, Shape::SHARED_BYTES, [&](emulation::Machine& machine, int64_t block) {
        MmaBlock<emulation::Machine, Shape>(machine, args, block).run();
    });
}

template <class T, class KV>
void run_mma(const Args& args, Kernel kernel) {
    if (kernel == Kernel::PREFILL) run_shape<MmaShape<T, KV, HEAD_SIZE, 4, true>>(args, kernel);
    else if (kernel == Kernel::PREFILL_SLICED) run_shape<MmaShape<T, KV, HEAD_SIZE, 4, false>>(args, kernel);
    else run_shape<MmaShape<T, KV, HEAD_SIZE, 1, false>>(args, kernel);
}

template <class KV>
void run_fp32(const Args& args) {
    run(args, Kernel::FP32, 4, [&](emulation::Machine& machine, int64_t block) {
        const int64_t item = block * WARPS + machine.warp();
        if (item < int64_t(args.batch) * args.positions * args.heads) fp32_warp<KV>(machine, args, item);
    });
}

// Ranges: the same, and a second launch where keys are split.

emulation::Memory range_inputs(const RangeArgs& args) {
    emulation::Memory memory;
    const size_t bank = size_t(args.bank_rows) * args.kv_heads * args.keys * args.head_size * bytes_of(args.kv_dtype);
    memory.readable(args.q, size_t(queries_of(args)) * args.head_size * bytes_of(args.dtype));
    memory.readable(args.k, bank);
    memory.readable(args.v, bank);
    memory.readable(args.media_rows, size_t(args.batch) * args.media * 8);
    memory.readable(args.first_media, size_t(args.batch) * args.positions * 8);
    memory.readable(args.phi, size_t(args.batch) * args.positions * 8);
    if (args.k_scale) memory.readable(args.k_scale, 4);
    if (args.v_scale) memory.readable(args.v_scale, 4);
    return memory;
}

template <class Body>
void run_range_blocks(emulation::Memory memory, int64_t count, int shared_bytes, const Body& body) {
    static std::mt19937 random(2);
    for (int64_t block = 0; block < count; ++block) {
        emulation::Block threads(memory, shared_bytes, random);
        threads.run([&](emulation::Machine& machine) { body(machine, block); });
    }
    memory.all_written();
}

template <class Shape>
void run_range_shape(const RangeArgs& args, RangeKernel kernel) {
    using T = typename Shape::T;
    using KV = typename Shape::KV;
    const int splits = splits_of(args, kernel);
    const size_t result = size_t(queries_of(args)) * args.head_size * bytes_of(args.dtype);
    const size_t partial = size_t(splits * queries_of(args) * (args.head_size + STATISTICS)) * 4;
    emulation::Memory memory = range_inputs(args);
    if (splits > 1) memory.result(args.workspace, partial);
    else memory.result(args.y, result);
    run_range_blocks(memory, unsplit_blocks(args, kernel) * splits, Shape::SHARED_BYTES, [&](emulation::Machine& machine, int64_t block) {
        RangeBlock<emulation::Machine, Shape>(machine, args, splits, unsigned(block)).run();
    });
    if (splits == 1) return;
    emulation::Memory parts;
    parts.readable(args.workspace, partial);
    if (args.v_scale) parts.readable(args.v_scale, 4);
    parts.result(args.y, result);
    run_range_blocks(parts, up(queries_of(args), WARPS), 4, [&](emulation::Machine& machine, int64_t block) {
        const int64_t query = block * WARPS + machine.warp();
        if (query < queries_of(args)) join_warp<T, KV>(machine, args, splits, query);
    });
}

template <class T, class KV>
void run_range_mma(const RangeArgs& args, RangeKernel kernel) {
    if (kernel == RangeKernel::DECODE) run_range_shape<MmaShape<T, KV, HEAD_SIZE, 1, false>>(args, kernel);
    else run_range_shape<MmaShape<T, KV, HEAD_SIZE, 4, false>>(args, kernel);
}

template <class KV>
void run_range_fp32(const RangeArgs& args) {
    emulation::Memory memory = range_inputs(args);
    memory.result(args.y, size_t(queries_of(args)) * args.head_size * 4);
    run_range_blocks(memory, unsplit_blocks(args, RangeKernel::FP32), 4, [&](emulation::Machine& machine, int64_t block) {
        const int64_t item = block * WARPS + machine.warp();
        if (item < queries_of(args)) range_fp32_warp<KV>(machine, args, item);
    });
}

constexpr int INVALID_VALUE = 1, NO_KERNEL_IMAGE = 209, LAUNCH_FAILURE = 719;  // cudaError_t

}  // namespace

extern "C" cudaError_t flamingo_phi_cross_attention(const flamingo_phi_cross_attention_args* args, cudaStream_t) {
    const Kernel kernel = args ? choose(*args) : Kernel::REFUSED;
    if (kernel == Kernel::REFUSED) return INVALID_VALUE;
    if (kernel == Kernel::NOTHING) return 0;
    const bool fp8 = args->kv_dtype == FLAMINGO_FLOAT8_E4M3, half = args->dtype == FLAMINGO_FLOAT16;
    if (kernel != Kernel::FP32 && args->head_size != HEAD_SIZE) return NO_KERNEL_IMAGE;
    try {
        if (kernel == Kernel::FP32) fp8 ? run_fp32<E4m3>(*args) : run_fp32<Single>(*args);
        else if (fp8) half ? run_mma<Half, E4m3>(*args, kernel) : run_mma<Bfloat, E4m3>(*args, kernel);
        else half ? run_mma<Half, Half>(*args, kernel) : run_mma<Bfloat, Bfloat>(*args, kernel);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", name_of(kernel), error.what());
        return LAUNCH_FAILURE;
    }
    return 0;
}

extern "C" const char* flamingo_phi_cross_attention_kernel(const flamingo_phi_cross_attention_args* args) {
    return args ? name_of(choose(*args)) : nullptr;
}

extern "C" size_t flamingo_phi_range_cross_attention_workspace(const flamingo_phi_range_cross_attention_args* args) {
    return args ? range_workspace(*args) : 0;
}

extern "C" cudaError_t flamingo_phi_range_cross_attention(const flamingo_phi_range_cross_attention_args* args, cudaStream_t) {
    const RangeKernel kernel = args ? range_choose(*args) : RangeKernel::REFUSED;
    if (kernel == RangeKernel::REFUSED) return INVALID_VALUE;
    if (kernel == RangeKernel::NOTHING) return 0;
    const bool fp8 = args->kv_dtype == FLAMINGO_FLOAT8_E4M3, half = args->dtype == FLAMINGO_FLOAT16;
    if (kernel != RangeKernel::FP32 && args->head_size != HEAD_SIZE) return NO_KERNEL_IMAGE;
    try {
        if (kernel == RangeKernel::FP32) fp8 ? run_range_fp32<E4m3>(*args) : run_range_fp32<Single>(*args);
        else if (fp8) half ? run_range_mma<Half, E4m3>(*args, kernel) : run_range_mma<Bfloat, E4m3>(*args, kernel);
        else half ? run_range_mma<Half, Half>(*args, kernel) : run_range_mma<Bfloat, Bfloat>(*args, kernel);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: %s\n", name_of(kernel), error.what());
        return LAUNCH_FAILURE;
    }
    return 0;
}

extern "C" const char* flamingo_phi_range_cross_attention_kernel(const flamingo_phi_range_cross_attention_args* args) {
    return args ? name_of(range_choose(*args)) : nullptr;
}
