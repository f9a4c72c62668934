// Cross-attention to ranges of media in fp32: a warp computes one head of one position, 32 keys at a time, as in fp32_warp.h.
#pragma once

#include "fp32_warp.h"
#include "range_block.h"

namespace flamingo {

// item: the warp's number among batch x positions x heads.
template <class KV, class Machine>
FLAMINGO_FUNCTION void range_fp32_warp(Machine& m, const RangeArgs& args, int64_t item) {
    constexpr int EACH = 4;  // dimensions of a lane
    const int lane = m.lane(), dims = args.head_size;
    const int64_t place = item / args.heads, batch = place / args.positions, head = item % args.heads / (args.heads / args.kv_heads);
    const float* q = static_cast<const float*>(args.q) + item * dims;
    float* y = static_cast<float*>(args.y) + item * dims;
    const Range range = range_of(m, args, batch, place % args.positions);
    const float scale_log2 = args.scale * (args.k_scale ? m.load_f32(args.k_scale) : 1.0f) * 1.44269504088896340736f;

    float o[EACH] = {}, greatest = -m.infinity(), sum = 0;
    ROLL for (int medium = range.first; medium <= range.last; ++medium) {
        const int row = row_of_medium(m, args, batch, medium);
        const int64_t start = (int64_t(row) * args.kv_heads + head) * args.keys * dims;
        ROLL for (int key0 = 0; row >= 0 && key0 < args.keys; key0 += WARP) {
            const int keys = args.keys - key0 < WARP ? args.keys - key0 : WARP;
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
            ROLL for (int key = 0; key < keys; ++key) {
                const float share = m.shuffle(p, key);
                UNROLL for (int i = 0; i < EACH; ++i) {
                    const int d = lane + i * WARP;
                    if (d < dims) o[i] += share * load_number(m, KV{}, args.v, start + int64_t(key0 + key) * dims + d);
                }
            }
        }
    }
    const float factor = sum > 0 ? (args.v_scale ? m.load_f32(args.v_scale) : 1.0f) * m.reciprocal(sum) : 0.0f;
    UNROLL for (int i = 0; i < EACH; ++i) {
        const int d = lane + i * WARP;
        if (d < dims) m.store_f32(y + d, o[i] * factor);
    }
}

}  // namespace flamingo
