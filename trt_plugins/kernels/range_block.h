// Cross-attention to ranges of media, on tensor cores: a block has queries that share a head of keys, and a part of the keys they see.
//
//   queries   of a request and a head of keys: position 0 head 0, 1, .., position 1 head 0, ..   16 (decode) or 64 (prefill) of a block
//   keys      of the media that any of them sees, in order, 64 at a time (a slice); the slices are split among blocks
//
//      medium   lo                  lo + 1                        hi
//      slice    0  1  2 .. 25       0  1  2 .. 25                 ..
//      block    [-- split 0 --][-- split 1 --][-- split 2 --]           each an online softmax over its slices
//
// A query that does not see a medium has scores of minus infinity there. With one split the results are written; with several, unnormalised
// sums with their greatest score and sum go to the workspace, and `join_warp` makes results of them.
//
// Tiles, pieces and products are those of mma_block.h.
#pragma once

#include "mma_block.h"
#include "phi_range_cross_attention.h"

namespace flamingo {

using RangeArgs = flamingo_phi_range_cross_attention_args;

constexpr int STATISTICS = 2;  // numbers of a partial result beside its sums: greatest score, sum of shares

struct Range {  // of media, from 1; first > last: none
    int first, last;
};

template <class Machine>
FLAMINGO_FUNCTION Range range_of(Machine& m, const RangeArgs& args, int64_t batch, int64_t position) {
    const int64_t place = batch * args.positions + position;
    const int64_t last = m.load_i64(args.phi + place), first = m.load_i64(args.first_media + place);
    if (last < 1 || last > args.media || first < 1 || first > last) return {1, 0};
    return {int(first), int(last)};
}

// Bank row of a medium, NO_MEDIUM for a row that is not in the bank.
template <class Machine>
FLAMINGO_FUNCTION int row_of_medium(Machine& m, const RangeArgs& args, int64_t batch, int medium) {
    const int64_t row = m.load_i64(args.media_rows + batch * args.media + medium - 1);
    return row >= 0 && row < args.bank_rows ? int(row) : NO_MEDIUM;
}

// The dimension, within a group of 32, of number i of the accumulators of tile t in a lane's row.
FLAMINGO_FUNCTION constexpr int dimension_of(int lane, int t, int i, bool fp8) {
    return fp8 ? t / 2 * 16 + lane % 4 * 4 + i * 2 + t % 2 : t * 8 + lane % 4 * 2 + i;
}

// Where partial results are: sums [splits][queries][head size], then greatest score and sum [splits][queries][2].
struct Partials {
    float *sums, *statistics;
    FLAMINGO_FUNCTION Partials(const RangeArgs& args, int splits) {
        sums = static_cast<float*>(args.workspace);
        statistics = sums + int64_t(splits) * args.batch * args.positions * args.heads * args.head_size;
    }
};

template <class Machine, class Shape>
class RangeBlock {
    using T = typename Shape::T;
    using P = Pieces<T, typename Shape::KV>;
    using Products = MmaProducts<Machine, Shape>;
    using Queries = typename Products::Queries;

    struct Item {  // a slice of a medium; medium > hi: none is left
        int medium, row, slice;
    };

    Machine& m;
    const RangeArgs& args;
    int splits, split, first, head, group, row_tile, share;  // first: query of the tile; head: of keys
    int lo, hi, left;                                        // media that any query sees; slices that are left to this block
    int64_t batch;

    FLAMINGO_FUNCTION int row_in_tile(int half) const { return row_tile * ROW_TILE + m.lane() / 4 + half * 8; }
    FLAMINGO_FUNCTION int rows() const { return args.positions * group; }
    FLAMINGO_FUNCTION int64_t query(int half) const {  // its number among all queries [batch, positions, heads]
        const int row = first + row_in_tile(half);
        return (batch * args.positions + row / group) * args.heads + head * group + row % group;
    }
    FLAMINGO_FUNCTION bool valid(int half) const { return first + row_in_tile(half) < rows(); }

    FLAMINGO_FUNCTION Item at(int medium, int slice) {
        Item item = {medium, NO_MEDIUM, slice};
        if (medium <= hi) item.row = row_of_medium(m, args, batch, medium);
        return item;
    }
    FLAMINGO_FUNCTION int slices() const { return (args.keys + SLICE - 1) / SLICE; }
    FLAMINGO_FUNCTION Item next(const Item& item) {
        --left;
        return item.slice + 1 < slices() ? Item{item.medium, item.row, item.slice + 1} : at(item.medium + 1, 0);
    }
    // The first slice at or after `item` that is in the bank and this block's; all lanes of all warps find the same.
    FLAMINGO_FUNCTION Item settle(Item item) {
        while (left > 0 && item.row < 0) item = next(item);
        return item;
    }

    // Begins the copy of up to 64 keys; what lies past the last one becomes zero.
    FLAMINGO_FUNCTION void fetch(const void* bank, const Item& item, uint32_t tile) {
        constexpr int ROW_BYTES = Shape::CHUNKS * CHUNK;
        const int key0 = item.slice * SLICE;
        const char* from = static_cast<const char*>(bank) + ((int64_t(item.row) * args.kv_heads + head) * args.keys + key0) * ROW_BYTES;
        constexpr int PIECES = SLICE * Shape::CHUNKS;
        UNROLL for (int i = 0; i < (PIECES + THREADS - 1) / THREADS; ++i) {
            const int piece = i * THREADS + m.thread();
            if (PIECES % THREADS != 0 && piece >= PIECES) break;
            const int key = piece / Shape::CHUNKS, chunk = piece % Shape::CHUNKS;
            m.copy16(tile + shared_chunk(key, chunk, Shape::CHUNKS), from + piece * CHUNK, key0 + key < args.keys);
        }
    }

    // As MmaBlock's, for queries that may see none of the keys: then nothing changes.
    FLAMINGO_FUNCTION void softmax(
        float (&s)[SLICE / 8][4], float scale_log2, int keys, const bool (&sees)[2], float (&greatest)[2], float (&sum)[2], float (&earlier)[2]) {
        const float infinity = m.infinity();
        float now[2] = {-infinity, -infinity};
        UNROLL for (int t = 0; t < SLICE / 8; ++t) {
            UNROLL for (int i = 0; i < 4; ++i) {
                s[t][i] = sees[i / 2] && t * 8 + accumulator_cell(m.lane(), i).column < keys ? s[t][i] * scale_log2 : -infinity;
                now[i / 2] = m.max(now[i / 2], s[t][i]);
            }
        }
        float base[2];
        UNROLL for (int half = 0; half < 2; ++half) {
            UNROLL for (int other = 1; other < 4; other *= 2) now[half] = m.max(now[half], m.shuffle_xor(now[half], other));
            now[half] = m.max(now[half], greatest[half]);
            base[half] = now[half] == -infinity ? 0.0f : now[half];
            earlier[half] = m.exp2(greatest[half] - base[half]);
            greatest[half] = now[half];
            sum[half] *= earlier[half];
        }
        float part[2] = {0, 0};
        UNROLL for (int t = 0; t < SLICE / 8; ++t) {
            UNROLL for (int i = 0; i < 4; ++i) {
                s[t][i] = m.exp2(s[t][i] - base[i / 2]);
                part[i / 2] += s[t][i];
            }
        }
        UNROLL for (int half = 0; half < 2; ++half) {
            UNROLL for (int other = 1; other < 4; other *= 2) part[half] += m.shuffle_xor(part[half], other);
            sum[half] += part[half];
        }
    }

    FLAMINGO_FUNCTION void store_result(int dims32, const float (&o)[4][4], const float (&factor)[2]) {
        UNROLL for (int half = 0; half < 2; ++half) {
            float row[4][2];
            UNROLL for (int t = 0; t < 4; ++t)
                UNROLL for (int i = 0; i < 2; ++i) row[t][i] = o[t][half * 2 + i] * factor[half];
            char* y = static_cast<char*>(args.y) + (valid(half) ? query(half) * (Shape::D * 2) : 0);
            P::store_y(m, y, valid(half), dims32, Shape::D, row);
        }
    }

    FLAMINGO_FUNCTION void store_partial(const Partials& partials, int dims32, const float (&o)[4][4]) {
        const int64_t queries = int64_t(args.batch) * args.positions * args.heads;
        UNROLL for (int half = 0; half < 2; ++half) {
            if (!valid(half)) continue;
            float* to = partials.sums + (split * queries + query(half)) * Shape::D;
            UNROLL for (int t = 0; t < 4; ++t) {
                UNROLL for (int i = 0; i < 2; ++i) {
                    const int d = dims32 * GROUP + dimension_of(m.lane(), t, i, P::BYTES == 1);
                    if (d < Shape::D) m.store_f32(to + d, o[t][half * 2 + i]);
                }
            }
        }
    }

public:
    FLAMINGO_FUNCTION RangeBlock(Machine& machine, const RangeArgs& a, int count, unsigned block) : m(machine), args(a), splits(count) {
        group = args.heads / args.kv_heads;
        const unsigned tiles = (unsigned(args.positions) * unsigned(group) + Shape::POSITIONS - 1) / Shape::POSITIONS;
        // Blocks that follow one another read the same keys.
        first = int(block % tiles) * Shape::POSITIONS;
        head = int(block / tiles % unsigned(args.kv_heads));
        split = int(block / tiles / unsigned(args.kv_heads) % unsigned(splits));
        batch = block / tiles / unsigned(args.kv_heads) / unsigned(splits);
        row_tile = Shape::ROW_TILES == 1 ? 0 : m.warp();
        share = Shape::SHARES == 1 ? 0 : m.warp();
    }

    FLAMINGO_FUNCTION void run() {
        Queries q;
        Range range[2];
        UNROLL for (int half = 0; half < 2; ++half) {
            const char* from = static_cast<const char*>(args.q) + (valid(half) ? query(half) * (Shape::D * 2) : 0);
            UNROLL for (int dims32 = 0; dims32 < Shape::GROUPS; ++dims32) {
                UNROLL for (int i = 0; i < 4; ++i) q[dims32][half][i] = 0;
                P::load_q(m, from, valid(half), dims32, Shape::D, q[dims32][half]);
            }
            range[half] = valid(half) ? range_of(m, args, batch, (first + row_in_tile(half)) / group) : Range{1, 0};
        }
        // The media of all queries of the block: each warp looks up all of them.
        lo = args.media + 1, hi = 0;
        UNROLL for (int row = 0; row < Shape::POSITIONS; row += WARP) {
            const int mine = row + m.lane();
            if (mine < Shape::POSITIONS && first + mine < rows()) {
                const Range each = range_of(m, args, batch, (first + mine) / group);
                if (each.first <= each.last) lo = each.first < lo ? each.first : lo, hi = each.last > hi ? each.last : hi;
            }
        }
        UNROLL for (int other = 1; other < WARP; other *= 2) {
            const int low = m.shuffle_xor(lo, other), high = m.shuffle_xor(hi, other);
            lo = low < lo ? low : lo, hi = high > hi ? high : hi;
        }
        const int all = hi < lo ? 0 : (hi - lo + 1) * slices(), each = (all + splits - 1) / splits, begin = split * each;
        left = all - begin < each ? all - begin : each;
        Item item = {1, NO_MEDIUM, 0};
        if (left > 0) item = settle(at(lo + begin / slices(), begin % slices()));
        if (left > 0) {
            fetch(args.k, item, Products::K_TILE);
            m.commit();
            fetch(args.v, item, Products::V_TILE);
            m.commit();
        }
        UNROLL for (int dims32 = 0; dims32 < Shape::GROUPS; ++dims32)
            UNROLL for (int half = 0; half < 2; ++half) P::arrange_q(m, q[dims32][half]);
        float scale_log2 = args.scale * 1.44269504088896340736f, v_scale = 1;
        if constexpr (P::BYTES == 1) {
            if (args.k_scale) scale_log2 *= m.load_f32(args.k_scale);
            if (args.v_scale) v_scale = m.load_f32(args.v_scale);
        }

        float o[Shape::GROUPS_EACH][4][4] = {};
        float greatest[2] = {-m.infinity(), -m.infinity()}, sum[2] = {};
        while (left > 0) {
            float s[SLICE / 8][4], earlier[2];
            m.forget();
            m.wait_for_older();
            m.sync();  // the keys are there
            Products::scores(m, share, q, s);
            const Item present = item;
            item = settle(next(item));
            const bool more = left > 0;
            if (more) {
                m.sync();  // the keys have been read
                fetch(args.k, item, Products::K_TILE);
            }
            m.commit();
            bool sees[2];
            UNROLL for (int half = 0; half < 2; ++half) sees[half] = present.medium >= range[half].first && present.medium <= range[half].last;
            softmax(s, scale_log2, args.keys - present.slice * SLICE, sees, greatest, sum, earlier);
            uint32_t p[Shape::KEYS16][4];
            UNROLL for (int u = 0; u < Shape::KEYS16; ++u) {
                UNROLL for (int i = 0; i < 4; ++i) p[u][i] = m.pack(T{}, s[2 * u + i / 2][i % 2 * 2], s[2 * u + i / 2][i % 2 * 2 + 1]);
            }
            m.forget();
            m.wait_for_older();
            m.sync();  // the values are there
            UNROLL for (int i = 0; i < Shape::GROUPS_EACH; ++i) {
                const int dims32 = share + i * Shape::SHARES;
                if (dims32 >= Shape::GROUPS) break;
                UNROLL for (int t = 0; t < 4; ++t)
                    UNROLL for (int c = 0; c < 4; ++c) o[i][t][c] *= earlier[c / 2];
                Products::values(m, p, dims32, o[i]);
            }
            if (more) {
                m.sync();  // the values have been read
                fetch(args.v, item, Products::V_TILE);
            }
            m.commit();
        }

        if (splits == 1) {
            float factor[2];
            UNROLL for (int half = 0; half < 2; ++half) factor[half] = sum[half] > 0 ? v_scale * m.reciprocal(sum[half]) : 0.0f;
            UNROLL for (int i = 0; i < Shape::GROUPS_EACH; ++i) {
                const int dims32 = share + i * Shape::SHARES;
                if (dims32 < Shape::GROUPS) store_result(dims32, o[i], factor);
            }
            return;
        }
        const Partials partials(args, splits);
        UNROLL for (int i = 0; i < Shape::GROUPS_EACH; ++i) {
            const int dims32 = share + i * Shape::SHARES;
            if (dims32 < Shape::GROUPS) store_partial(partials, dims32, o[i]);
        }
        if (share == 0 && m.lane() % 4 == 0) {
            const int64_t queries = int64_t(args.batch) * args.positions * args.heads;
            UNROLL for (int half = 0; half < 2; ++half) {
                if (!valid(half)) continue;
                float* to = partials.statistics + (split * queries + query(half)) * STATISTICS;
                m.store_f32(to, greatest[half]);
                m.store_f32(to + 1, sum[half]);
            }
        }
    }
};

// Joins the partial results of one query: a lane has four dimensions.
template <class T, class KV, class Machine>
FLAMINGO_FUNCTION void join_warp(Machine& m, const RangeArgs& args, int splits, int64_t query) {
    const int64_t queries = int64_t(args.batch) * args.positions * args.heads;
    const Partials partials(args, splits);
    const int dims = args.head_size, d = m.lane() * 4;
    const float infinity = m.infinity();
    float greatest = -infinity;
    for (int split = 0; split < splits; ++split) greatest = m.max(greatest, m.load_f32(partials.statistics + (split * queries + query) * STATISTICS));
    const float base = greatest == -infinity ? 0.0f : greatest;
    float total = 0, y[4] = {};
    for (int split = 0; split < splits; ++split) {
        const float* statistics = partials.statistics + (split * queries + query) * STATISTICS;
        const float weight = m.exp2(m.load_f32(statistics) - base);
        total += weight * m.load_f32(statistics + 1);
        if (weight > 0 && d < dims) {
            const float* sums = partials.sums + (split * queries + query) * dims + d;
            UNROLL for (int i = 0; i < 4; ++i) y[i] += weight * m.load_f32(sums + i);
        }
    }
    float factor = total > 0 ? m.reciprocal(total) : 0.0f;
    if constexpr (Pieces<T, KV>::BYTES == 1) {
        if (args.v_scale) factor *= m.load_f32(args.v_scale);
    }
    if (d < dims)
        m.store8(static_cast<char*>(args.y) + (query * dims + d) * 2, m.pack(T{}, y[0] * factor, y[1] * factor), m.pack(T{}, y[2] * factor, y[3] * factor));
}

}  // namespace flamingo
