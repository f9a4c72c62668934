// Phi cross-attention in fp32: a warp computes one head of one position, with an online softmax over 32 keys at a time. Each lane scores a
// key, then takes every 32nd head dimension of the values. K and V are fp32 or FP8 E4M3.
#pragma once

#include "mma_block.h"

namespace flamingo {

struct Single {};

template <class Machine>
FLAMINGO_FUNCTION float load_number(Machine& m, Single, const void* p, int64_t i) {
    return m.load_f32(static_cast<const float*>(p) + i);
}
template <class Machine>
FLAMINGO_FUNCTION float load_number(Machine& m, E4m3, const void* p, int64_t i) {
    return m.load_e4m3(static_cast<const uint8_t*>(p) + i);
}

// item: the warp's number among batch x positions x heads.
template <class KV, class Machine>
FLAMINGO_FUNCTION void fp32_warp(Machine& m, const Args& args, int64_t item) {
    constexpr int EACH = 4;  // dimensions of a lane
    const int lane = m.lane(), dims = args.head_size;
    const int64_t place = item / args.heads, head = item % args.heads;
    const float* q = static_cast<const float*>(args.q) + item * dims;
    float* y = static_cast<float*>(args.y) + item * dims;
    const int row = bank_row(m, args, place / args.positions, place % args.positions);
    const int64_t start = (int64_t(row) * args.heads + head) * args.latents * dims;
    const float scale_log2 = args.scale * (args.k_scale ? m.load_f32(args.k_scale) : 1.0f) * 1.44269504088896340736f;

    float o[EACH] = {}, greatest = -m.infinity(), sum = 0;
    for (int key0 = 0; row >= 0 && key0 < args.latents; key0 += WARP) {
        const int keys = args.latents - key0 < WARP ? args.latents - key0 : WARP;
        float score = 0;
        if (lane < keys) {
            for (int d = 0; d < dims; ++d) score += m.load_f32(q + d) * load_number(m, KV{}, args.k, start + int64_t(key0 + lane) * dims + d);
        }
        score = lane < keys ? score * scale_log2 : -m.infinity();
        float now = m.max(score, greatest);
        for (int other = 1; other < WARP; other *= 2) now = m.max(now, m.shuffle_xor(now, other));
        const float p = m.exp2(score - now), earlier = m.exp2(greatest - now);
        greatest = now;
        float part = p;
        for (int other = 1; other < WARP; other *= 2) part += m.shuffle_xor(part, other);
        sum = sum * earlier + part;
        UNROLL for (int i = 0; i < EACH; ++i) o[i] *= earlier;
        for (int key = 0; key < keys; ++key) {
            const float share = m.shuffle(p, key);
            UNROLL for (int i = 0; i < EACH; ++i) {
                const int d = lane + i * WARP;
                if (d < dims) o[i] += share * load_number(m, KV{}, args.v, start + int64_t(key0 + key) * dims + d);
            }
        }
    }
    const float factor = row < 0 ? 0.0f : (args.v_scale ? m.load_f32(args.v_scale) : 1.0f) * m.reciprocal(sum);
    UNROLL for (int i = 0; i < EACH; ++i) {
        const int d = lane + i * WARP;
        if (d < dims) m.store_f32(y + d, row < 0 ? 0.0f : o[i] * factor);
    }
}

}  // namespace flamingo
