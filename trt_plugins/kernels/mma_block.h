// One block of phi cross-attention on tensor cores: rows of queries that follow one another, one head.
//
//   prefill   64 positions, four warps with 16 rows each            decode   up to 16 positions (beams), shared by four warps
//
//          keys 0..63 of one medium                                          keys 0..15 | 16..31 | 32..47 | 48..63
//   rows  +------------------------+                                  rows  +-----------+--------+--------+--------+
//   0..15 | warp 0                 |                                  0..15 | warp 0    | warp 1 | warp 2 | warp 3 |  scores, exchanged
//   ..31  | warp 1                 |                                        +-----------+--------+--------+--------+
//   ..47  | warp 2                 |                                          dims 0..31   32..63   64..95   96..127
//   ..63  | warp 3                 |                                  0..15 | warp 0    | warp 1 | warp 2 | warp 3 |  results
//         +------------------------+                                        +-----------+--------+--------+--------+
//
// Positions of equal bank row in sequence are a run. The block goes through the runs of its tile: K and V of the run's medium come to shared
// memory (64 keys at a time), each warp with rows in the run computes, and only rows of the run are written. The next K is on its way while
// the softmax and V's product run, the next V while the next scores do. With at most 64 latents (ONE_PASS) all scores of a row are in
// registers at once: one softmax, and results leave 32 dimensions at a time. Otherwise an online softmax goes through slices of 64.
//
// Written against a Machine: the instructions of a thread. cuda_machine.cuh is the real one; the tests have one that runs on the CPU.
#pragma once

#include "layout.h"
#include "phi_cross_attention.h"

namespace flamingo {

using Args = flamingo_phi_cross_attention_args;

struct Half {};
struct Bfloat {};
struct E4m3 {};

constexpr int NO_MEDIUM = -1;  // a row of zeros
constexpr int OUTSIDE = -2;    // past the last position: nothing to write

// Bank row that a position sees. The medium's number comes from the caller's tensors: anything out of range is "no medium".
template <class Machine>
FLAMINGO_FUNCTION int bank_row(Machine& m, const Args& args, int64_t batch, int64_t position) {
    if (position >= args.positions) return OUTSIDE;
    const int64_t medium = m.load_i64(args.phi + batch * args.positions + position);
    if (medium < 1 || medium > args.media) return NO_MEDIUM;
    const int64_t row = m.load_i64(args.media_rows + batch * args.media + medium - 1);
    return row >= 0 && row < args.bank_rows ? int(row) : NO_MEDIUM;
}

// Two numbers of FP8 E4M3 in 16 bits each, without an instruction for it: the bits as fp16, where the exponent's bias is 8 more, times 256.
template <class Machine>
FLAMINGO_FUNCTION uint32_t widen_by_bits(Machine& m, uint32_t two) {
    const uint32_t apart = (two & 0xff) << 8 | (two & 0xff00) << 16;
    const uint32_t number = m.multiply(Half{}, (apart & 0x80008000) | (apart >> 1 & 0x3f803f80), 0x5c005c00);
    const uint32_t nan = ((apart & 0x7f00) == 0x7f00 ? 0x7fffu : 0) | ((apart & 0x7f000000) == 0x7f000000 ? 0x7fff0000u : 0);
    return number | nan;
}

// y_i of lane j = x_j of lane i, within each quad of lanes.
template <class Machine>
FLAMINGO_FUNCTION void transpose_quad(Machine& m, uint32_t (&x)[4]) {
    const bool odd = m.lane() & 1, high = m.lane() & 2;
    UNROLL for (int i = 0; i < 4; i += 2) {
        const uint32_t got = m.shuffle_xor(odd ? x[i] : x[i + 1], 1);
        (odd ? x[i] : x[i + 1]) = got;
    }
    UNROLL for (int i = 0; i < 2; ++i) {
        const uint32_t got = m.shuffle_xor(high ? x[i] : x[i + 2], 2);
        (high ? x[i] : x[i + 2]) = got;
    }
}

// Pieces of 16-bit K and V, and the queries and results that go with them. A quad reads or writes 32 dimensions of a row, 16 bytes a lane.
template <class T, class KV>
struct Pieces {
    static constexpr int BYTES = 2;

    // Second operands for 16 keys (two tiles of eight) and 16 dimensions.
    template <int CHUNKS, class Machine>
    static FLAMINGO_FUNCTION void load_k(Machine& m, uint32_t tile, int keys16, int step, uint32_t (&b)[2][2]) {
        const Cell cell = k_address(m.lane(), keys16, step);
        uint32_t r[4];
        m.load_matrices(tile + shared_chunk(cell.row, cell.column, CHUNKS), r);
        UNROLL for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
    }

    // The same for 16 keys and 16 dimensions of V (two tiles of eight dimensions), transposed on the way.
    template <int CHUNKS, class Machine>
    static FLAMINGO_FUNCTION void load_v(Machine& m, uint32_t tile, int keys16, int step, uint32_t (&b)[2][2]) {
        const Cell cell = v_address(m.lane(), keys16, step);
        uint32_t r[4];
        m.load_matrices_transposed(tile + shared_chunk(cell.row, cell.column, CHUNKS), r);
        UNROLL for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
    }

    // 32 dimensions of one query, and what makes first operands of them: x[2 u], x[2 u + 1] are columns 0..7 and 8..15 of the u-th 16.
    template <class Machine>
    static FLAMINGO_FUNCTION void load_q(Machine& m, const char* q, bool valid, int group, int dims, uint32_t (&x)[4]) {
        const int first = group * GROUP + m.lane() % 4 * 8;
        if (valid && first < dims) m.load16(q + first * 2, x);
    }

    template <class Machine>
    static FLAMINGO_FUNCTION void arrange_q(Machine& m, uint32_t (&x)[4]) {
        transpose_quad(m, x);
    }

    template <class Machine>
    static FLAMINGO_FUNCTION void store_y(Machine& m, char* y, bool valid, int group, int dims, const float (&o)[4][2]) {
        uint32_t x[4];
        UNROLL for (int t = 0; t < 4; ++t) x[t] = m.pack(T{}, o[t][0], o[t][1]);
        transpose_quad(m, x);
        const int first = group * GROUP + m.lane() % 4 * 8;
        if (valid && first < dims) m.store16(y + first * 2, x);
    }
};

// FP8: a chunk is 16 dimensions, of which ldmatrix hands each lane of a quad four. The sum over dimensions does not mind their order, so the
// queries are read in the same order, four dimensions a lane; likewise the two tiles of results are the even and the odd dimensions.
template <class T>
struct Pieces<T, E4m3> {
    static constexpr int BYTES = 1;

    template <int CHUNKS, class Machine>
    static FLAMINGO_FUNCTION void load_k(Machine& m, uint32_t tile, int keys16, int step, uint32_t (&b)[2][2]) {
        const Cell cell = fp8_address(m.lane(), keys16, step);
        uint32_t r[2];
        m.load_matrices(tile + shared_chunk(cell.row, cell.column, CHUNKS), r);
        UNROLL for (int t = 0; t < 2; ++t) {
            b[t][0] = m.widen(T{}, r[t] & 0xffff);
            b[t][1] = m.widen(T{}, r[t] >> 16);
        }
    }

    template <int CHUNKS, class Machine>
    static FLAMINGO_FUNCTION void load_v(Machine& m, uint32_t tile, int keys16, int step, uint32_t (&b)[2][2]) {
        const Cell cell = fp8_address(m.lane(), keys16, step);
        uint32_t r[2];
        m.load_matrices_transposed(tile + shared_chunk(cell.row, cell.column, CHUNKS), r);
        UNROLL for (int i = 0; i < 2; ++i) {  // bytes: key 2j even, odd dimension, key 2j + 1 even, odd
            b[0][i] = m.widen(T{}, (r[i] & 0xff) | (r[i] >> 8 & 0xff00));
            b[1][i] = m.widen(T{}, (r[i] >> 8 & 0xff) | (r[i] >> 16 & 0xff00));
        }
    }

    template <class Machine>
    static FLAMINGO_FUNCTION void load_q(Machine& m, const char* q, bool valid, int group, int dims, uint32_t (&x)[4]) {
        UNROLL for (int u = 0; u < 2; ++u) {
            const int first = group * GROUP + u * 16 + m.lane() % 4 * 4;
            if (valid && first < dims) m.load8(q + first * 2, x[2 * u], x[2 * u + 1]);
        }
    }

    template <class Machine>
    static FLAMINGO_FUNCTION void arrange_q(Machine&, uint32_t (&)[4]) {}

    template <class Machine>
    static FLAMINGO_FUNCTION void store_y(Machine& m, char* y, bool valid, int group, int dims, const float (&o)[4][2]) {
        UNROLL for (int u = 0; u < 2; ++u) {
            const uint32_t low = m.pack(T{}, o[2 * u][0], o[2 * u + 1][0]), high = m.pack(T{}, o[2 * u][1], o[2 * u + 1][1]);
            const int first = group * GROUP + u * 16 + m.lane() % 4 * 4;
            if (valid && first < dims) m.store8(y + first * 2, low, high);
        }
    }
};

// Positions of a tile in sequence that see one bank row. `row` < 0: there is no such run.
struct Run {
    int start, stop, row;
};

// Where runs begin in a tile of at most 64 positions, as bits that all lanes of all warps have alike: the compiler then knows that a warp goes
// through its runs together. A lane looks up the positions `lane` and `lane` + 32.
struct Runs {
    uint64_t starts, media;  // bit p: position p has another row than position p - 1; position p has a medium

    template <class Machine>
    FLAMINGO_FUNCTION Runs(Machine& m, const Args& args, int64_t batch, int first, int positions) {
        const int lane = m.lane();
        const int low = lane < positions ? bank_row(m, args, batch, first + lane) : OUTSIDE;
        const int high = lane + WARP < positions ? bank_row(m, args, batch, first + lane + WARP) : OUTSIDE;
        const int before_low = m.shuffle(low, (lane + WARP - 1) % WARP);
        const int before_high = m.shuffle(lane == WARP - 1 ? low : high, (lane + WARP - 1) % WARP);
        starts = bits(m, lane == 0 || low != before_low, high != before_high);
        media = bits(m, low >= 0, high >= 0);
    }

    template <class Machine>
    static FLAMINGO_FUNCTION uint64_t bits(Machine& m, bool lower, bool upper) {
        const uint64_t one = m.ballot(lower), other = m.ballot(upper);
        return one | other << WARP;
    }

    FLAMINGO_FUNCTION bool has_medium(int position) const { return media >> position & 1; }

    // The first run with a medium at or after `from`, where a run begins. Its row is looked up anew, rather than held in registers all along.
    template <class Machine>
    FLAMINGO_FUNCTION Run next(Machine& m, const Args& args, int64_t batch, int first, int from) const {
        const uint64_t here = from < 2 * WARP ? starts & media & ~uint64_t(0) << from : 0;
        if (!here) return {from, from, NO_MEDIUM};
        const int start = m.first_bit(here);
        const uint64_t later = starts & ~uint64_t(1) << start;
        return {start, later ? m.first_bit(later) : 2 * WARP, bank_row(m, args, batch, first + start)};
    }
};

// T: Half or Bfloat. KV: T, or E4m3. D: head size. ROW_TILES: 4 for prefill, 1 for decode. ONE_PASS: prefill of at most 64 latents.
template <class T_, class KV_, int D_, int ROW_TILES_, bool ONE_PASS_>
struct MmaShape {
    using T = T_;
    using KV = KV_;
    static constexpr int D = D_, ROW_TILES = ROW_TILES_;
    static constexpr bool ONE_PASS = ONE_PASS_;
    static constexpr int POSITIONS = ROW_TILES * ROW_TILE;          // of a block
    static constexpr int SHARES = WARPS / ROW_TILES;                // warps that share a row tile
    static constexpr int STEPS = D / 16;
    static constexpr int GROUPS = (D + GROUP - 1) / GROUP;
    static constexpr int GROUPS_EACH = (GROUPS + SHARES - 1) / SHARES;
    static constexpr int KEYS16 = SLICE / 16;
    static constexpr int KEYS16_EACH = KEYS16 / SHARES;
    static constexpr int CHUNKS = D * Pieces<T, KV>::BYTES / CHUNK;  // of a row of K or V
    static constexpr int TILE_BYTES = SLICE * CHUNKS * CHUNK;
    static constexpr int SHARED_BYTES = 2 * TILE_BYTES + (SHARES > 1 ? EXCHANGE_BYTES : 0);
};

// The products of a block, and where its tiles lie in shared memory.
template <class Machine, class Shape>
struct MmaProducts {
    using T = typename Shape::T;
    using P = Pieces<T, typename Shape::KV>;
    using Queries = uint32_t[Shape::GROUPS][2][4];  // [32 dimensions][row, row + 8][column]
    static constexpr uint32_t K_TILE = 0, V_TILE = Shape::TILE_BYTES, EXCHANGE = 2 * Shape::TILE_BYTES;

    // q . k of 16 rows and the 64 keys of the slice; the warps of a shared row tile compute 16 keys each and exchange them.
    static FLAMINGO_FUNCTION void scores(Machine& m, int share, const Queries& q, float (&s)[SLICE / 8][4]) {
        float mine[Shape::KEYS16_EACH * 2][4] = {};
        UNROLL for (int step = 0; step < Shape::STEPS; ++step) {
            const uint32_t(&x)[2][4] = q[step / 2];
            const int column = step % 2 * 2;
            const uint32_t a[4] = {x[0][column], x[1][column], x[0][column + 1], x[1][column + 1]};
            UNROLL for (int i = 0; i < Shape::KEYS16_EACH; ++i) {
                uint32_t b[2][2];
                P::template load_k<Shape::CHUNKS>(m, K_TILE, share * Shape::KEYS16_EACH + i, step, b);
                UNROLL for (int t = 0; t < 2; ++t) m.mma(T{}, mine[2 * i + t], a, b[t]);
            }
        }
        if constexpr (Shape::SHARES == 1) {
            UNROLL for (int t = 0; t < SLICE / 8; ++t)
                UNROLL for (int i = 0; i < 4; ++i) s[t][i] = mine[t][i];
        } else {
            exchange(m, share, mine, s);
        }
    }

    static FLAMINGO_FUNCTION void exchange(Machine& m, int share, const float (&mine)[Shape::KEYS16_EACH * 2][4], float (&s)[SLICE / 8][4]) {
        constexpr int TILES = Shape::KEYS16_EACH * 2;
        UNROLL for (int t = 0; t < TILES; ++t) {
            UNROLL for (int i = 0; i < 4; i += 2) {
                const Cell cell = accumulator_cell(m.lane(), i);
                m.store_shared(EXCHANGE + exchange_offset(cell.row, (share * TILES + t) * 8 + cell.column), mine[t][i], mine[t][i + 1]);
            }
        }
        m.sync();
        UNROLL for (int t = 0; t < SLICE / 8; ++t) {
            UNROLL for (int i = 0; i < 4; i += 2) {
                const Cell cell = accumulator_cell(m.lane(), i);
                m.load_shared(EXCHANGE + exchange_offset(cell.row, t * 8 + cell.column), s[t][i], s[t][i + 1]);
            }
        }
    }

    // Adds p . v for 32 dimensions.
    static FLAMINGO_FUNCTION void values(Machine& m, const uint32_t (&p)[Shape::KEYS16][4], int group, float (&sums)[4][4]) {
        UNROLL for (int u = 0; u < Shape::KEYS16; ++u) {
            UNROLL for (int half = 0; half < 2; ++half) {
                if (group * 2 + half >= Shape::STEPS) continue;
                uint32_t b[2][2];
                P::template load_v<Shape::CHUNKS>(m, V_TILE, u, group * 2 + half, b);
                UNROLL for (int t = 0; t < 2; ++t) m.mma(T{}, sums[half * 2 + t], p[u], b[t]);
            }
        }
    }
};

template <class Machine, class Shape>
class MmaBlock {
    using T = typename Shape::T;
    using P = Pieces<T, typename Shape::KV>;
    using Products = MmaProducts<Machine, Shape>;
    using Queries = typename Products::Queries;
    static constexpr uint32_t K_TILE = Products::K_TILE, V_TILE = Products::V_TILE;

    struct Item {  // a slice of a run's medium
        Run run;
        int key0;
    };

    Machine& m;
    const Args& args;
    int first, head, row_tile, share;  // first: the tile's first position
    int64_t batch, origin;              // origin: the first position's number among all rows of q and y

    FLAMINGO_FUNCTION int row_in_tile(int half) const { return row_tile * ROW_TILE + m.lane() / 4 + half * 8; }
    FLAMINGO_FUNCTION int64_t row_offset(int half) const {  // in bytes, of a row of q or y
        return (origin + int64_t(row_in_tile(half)) * args.heads) * (Shape::D * 2);
    }

    // The lane's two rows of queries; the loads are on their way while phi is looked up.
    FLAMINGO_FUNCTION void load_queries(Queries& q) {
        UNROLL for (int half = 0; half < 2; ++half) {
            const bool valid = first + row_in_tile(half) < args.positions;
            const char* from = static_cast<const char*>(args.q) + (valid ? row_offset(half) : 0);
            UNROLL for (int group = 0; group < Shape::GROUPS; ++group) {
                UNROLL for (int i = 0; i < 4; ++i) q[group][half][i] = 0;
                P::load_q(m, from, valid, group, Shape::D, q[group][half]);
            }
        }
    }

    FLAMINGO_FUNCTION void arrange_queries(Queries& q) {
        UNROLL for (int group = 0; group < Shape::GROUPS; ++group)
            UNROLL for (int half = 0; half < 2; ++half) P::arrange_q(m, q[group][half]);
    }

    // Begins the copy of up to 64 keys; what lies past the last latent becomes zero.
    FLAMINGO_FUNCTION void fetch(const void* bank, const Item& item, uint32_t tile) {
        constexpr int ROW_BYTES = Shape::CHUNKS * CHUNK;
        const char* from = static_cast<const char*>(bank) + ((int64_t(item.run.row) * args.heads + head) * args.latents + item.key0) * ROW_BYTES;
        constexpr int PIECES = SLICE * Shape::CHUNKS;
        UNROLL for (int i = 0; i < (PIECES + THREADS - 1) / THREADS; ++i) {
            const int piece = i * THREADS + m.thread();
            if (PIECES % THREADS != 0 && piece >= PIECES) break;
            const int key = piece / Shape::CHUNKS, chunk = piece % Shape::CHUNKS;
            const bool there = item.key0 + key < args.latents;
            m.copy16(tile + shared_chunk(key, chunk, Shape::CHUNKS), from + piece * CHUNK, there);
        }
    }

    FLAMINGO_FUNCTION Item next(const Runs& runs, const Item& item) {
        if (!Shape::ONE_PASS && item.key0 + SLICE < args.latents) return {item.run, item.key0 + SLICE};
        return {runs.next(m, args, batch, first, item.run.stop), 0};
    }

    // Scores become exp2 of their distance to the greatest so far. Returns for both rows of the lane what earlier results must be scaled by.
    FLAMINGO_FUNCTION void softmax(float (&s)[SLICE / 8][4], float scale_log2, int keys, float (&greatest)[2], float (&sum)[2], float (&earlier)[2]) {
        const float infinity = m.infinity();
        float now[2] = {-infinity, -infinity};
        UNROLL for (int t = 0; t < SLICE / 8; ++t) {
            UNROLL for (int i = 0; i < 4; ++i) {
                s[t][i] = t * 8 + accumulator_cell(m.lane(), i).column < keys ? s[t][i] * scale_log2 : -infinity;
                now[i / 2] = m.max(now[i / 2], s[t][i]);
            }
        }
        UNROLL for (int half = 0; half < 2; ++half) {
            UNROLL for (int other = 1; other < 4; other *= 2) now[half] = m.max(now[half], m.shuffle_xor(now[half], other));
            now[half] = m.max(now[half], greatest[half]);
            earlier[half] = m.exp2(greatest[half] - now[half]);
            greatest[half] = now[half];
            sum[half] *= earlier[half];
        }
        float part[2] = {0, 0};
        UNROLL for (int t = 0; t < SLICE / 8; ++t) {
            UNROLL for (int i = 0; i < 4; ++i) {
                s[t][i] = m.exp2(s[t][i] - now[i / 2]);
                part[i / 2] += s[t][i];
            }
        }
        UNROLL for (int half = 0; half < 2; ++half) {
            UNROLL for (int other = 1; other < 4; other *= 2) part[half] += m.shuffle_xor(part[half], other);
            sum[half] += part[half];
        }
    }

    FLAMINGO_FUNCTION void store(int group, const float (&o)[4][4], const float (&factor)[2], const bool (&mine)[2]) {
        UNROLL for (int half = 0; half < 2; ++half) {
            float row[4][2];
            UNROLL for (int t = 0; t < 4; ++t)
                UNROLL for (int i = 0; i < 2; ++i) row[t][i] = o[t][half * 2 + i] * factor[half];
            P::store_y(m, static_cast<char*>(args.y) + (mine[half] ? row_offset(half) : 0), mine[half], group, Shape::D, row);
        }
    }

    FLAMINGO_FUNCTION void store_zeros(const Runs& runs) {
        bool mine[2];
        UNROLL for (int half = 0; half < 2; ++half) mine[half] = first + row_in_tile(half) < args.positions && !runs.has_medium(row_in_tile(half));
        if (!m.ballot(mine[0] || mine[1])) return;
        const float zero[4][4] = {}, one[2] = {1, 1};
        ROLL for (int group = share; group < Shape::GROUPS; group += Shape::SHARES) store(group, zero, one, mine);
    }

public:
    FLAMINGO_FUNCTION MmaBlock(Machine& machine, const Args& a, unsigned block) : m(machine), args(a) {
        const unsigned tiles = (unsigned(args.positions) + Shape::POSITIONS - 1) / Shape::POSITIONS, tile = block / unsigned(args.heads);
        head = int(block % unsigned(args.heads));
        batch = tile / tiles;
        first = int(tile % tiles) * Shape::POSITIONS;
        origin = (batch * args.positions + first) * args.heads + head;
        row_tile = Shape::ROW_TILES == 1 ? 0 : m.warp();
        share = Shape::SHARES == 1 ? 0 : m.warp();
    }

    FLAMINGO_FUNCTION void run() {
        Queries q;
        load_queries(q);
        const Runs runs(m, args, batch, first, Shape::POSITIONS);
        Item item = {runs.next(m, args, batch, first, 0), 0};
        if (item.run.row >= 0) {
            fetch(args.k, item, K_TILE);
            m.commit();
            fetch(args.v, item, V_TILE);
            m.commit();
        }
        store_zeros(runs);
        arrange_queries(q);
        float scale_log2 = args.scale * 1.44269504088896340736f, v_scale = 1;
        if constexpr (P::BYTES == 1) {
            if (args.k_scale) scale_log2 *= m.load_f32(args.k_scale);
            if (args.v_scale) v_scale = m.load_f32(args.v_scale);
        }

        float o[Shape::GROUPS_EACH][4][4];  // kept from slice to slice
        float greatest[2] = {}, sum[2] = {};
        while (item.run.row >= 0) {
            const bool first_slice = Shape::ONE_PASS || item.key0 == 0, last_slice = Shape::ONE_PASS || item.key0 + SLICE >= args.latents;
            const bool active = Shape::ROW_TILES == 1 || (item.run.start < (row_tile + 1) * ROW_TILE && item.run.stop > row_tile * ROW_TILE);
            float s[SLICE / 8][4], earlier[2];
            if (first_slice) {
                UNROLL for (int half = 0; half < 2; ++half) greatest[half] = -m.infinity(), sum[half] = 0;
            }
            m.forget();
            m.wait_for_older();
            m.sync();  // K is there
            if (active) Products::scores(m, share, q, s);
            const Item following = next(runs, item);
            const bool more = following.run.row >= 0;
            if (more) {
                m.sync();  // K has been read
                fetch(args.k, following, K_TILE);
            }
            m.commit();
            uint32_t p[Shape::KEYS16][4];
            if (active) {
                softmax(s, scale_log2, args.latents - item.key0, greatest, sum, earlier);
                UNROLL for (int u = 0; u < Shape::KEYS16; ++u) {
                    UNROLL for (int i = 0; i < 4; ++i) p[u][i] = m.pack(T{}, s[2 * u + i / 2][i % 2 * 2], s[2 * u + i / 2][i % 2 * 2 + 1]);
                }
            }
            m.forget();
            m.wait_for_older();
            m.sync();  // V is there
            if (active) {
                bool mine[2];
                float factor[2];
                UNROLL for (int half = 0; half < 2; ++half) {
                    mine[half] = row_in_tile(half) >= item.run.start && row_in_tile(half) < item.run.stop;
                    factor[half] = v_scale * m.reciprocal(sum[half]);
                }
                if constexpr (Shape::ONE_PASS) {
                    ROLL for (int group = share; group < Shape::GROUPS; group += Shape::SHARES) {
                        float sums[4][4] = {};
                        Products::values(m, p, group, sums);
                        store(group, sums, factor, mine);
                    }
                } else {
                    UNROLL for (int i = 0; i < Shape::GROUPS_EACH; ++i) {
                        const int group = share + i * Shape::SHARES;
                        if (group >= Shape::GROUPS) break;
                        UNROLL for (int t = 0; t < 4; ++t)
                            UNROLL for (int c = 0; c < 4; ++c) o[i][t][c] = first_slice ? 0.0f : o[i][t][c] * earlier[c / 2];
                        Products::values(m, p, group, o[i]);
                        if (last_slice) store(group, o[i], factor, mine);
                    }
                }
            }
            if (more) {
                m.sync();  // V has been read
                fetch(args.v, following, V_TILE);
            }
            m.commit();
            item = following;
        }
    }
};

}  // namespace flamingo
