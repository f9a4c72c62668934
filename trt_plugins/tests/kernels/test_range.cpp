// The kernels of ranges, thread by thread on the CPU, against a plain fp64 loop, on random ragged cases.
//
//   test_range SEED CASES     of each shape: prompts with images of several tiles, alone and side by side, heads that share keys, ranges and rows
//                             out of range, keys that fill no slice, keys split over blocks, NaN in all that is not read
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "emulator.h"
#include "range_choose.h"
#include "range_fp32_warp.h"

namespace {

using emulation::require;

struct RangeCase {
    Type type, kv_type;
    std::mt19937& random;
    RangeArgs args = {};
    std::vector<Tensor> tensors;
    std::vector<int64_t> rows, first, phi;
    float k_scale = 0, v_scale = 0;

    double normal() { return std::normal_distribution<double>()(random); }

    RangeCase(Type t, Type kv, int head_size, int keys, int positions, int kv_heads, int group, std::mt19937& r) : type(t), kv_type(kv), random(r) {
        args.batch = draw(r, 1, 2), args.positions = positions, args.kv_heads = kv_heads, args.heads = kv_heads * group;
        args.head_size = head_size, args.keys = keys, args.media = draw(r, 0, 6), args.bank_rows = draw(r, 1, 5);
        args.dtype = type.dtype, args.kv_dtype = kv_type.dtype;
        args.scale = float(draw(r, 1, 3) / std::sqrt(head_size));
        draw_ranges();
        const int64_t queries = int64_t(args.batch) * positions * args.heads;
        const int64_t bank = int64_t(args.bank_rows) * kv_heads * keys * head_size;
        const size_t workspace = range_workspace(args);
        for (size_t size : {size_t(queries * head_size * type.bytes), size_t(bank * kv_type.bytes), size_t(bank * kv_type.bytes),
                            size_t(queries * head_size * type.bytes), workspace})
            tensors.emplace_back(size);
        for (int64_t i = 0; i < queries * head_size; ++i) {
            type.set(tensors[0].data(), i, normal());
            type.set_nan(tensors[3].data(), i);
        }
        const std::vector<bool> seen = seen_rows();
        for (int64_t i = 0; i < bank; ++i) {
            for (int t : {1, 2}) {
                if (seen[i / (bank / args.bank_rows)]) kv_type.set(tensors[t].data(), i, normal());
                else kv_type.set_nan(tensors[t].data(), i);
            }
        }
        args.q = tensors[0].data(), args.k = tensors[1].data(), args.v = tensors[2].data(), args.y = tensors[3].data();
        args.workspace = workspace ? tensors[4].data() : nullptr;
        args.media_rows = rows.data(), args.first_media = first.data(), args.phi = phi.data();
        if (kv_type.dtype == FLAMINGO_FLOAT8_E4M3 && draw(r, 0, 3)) {
            k_scale = std::ldexp(1.0f, draw(r, -2, 1)), v_scale = std::ldexp(1.25f, draw(r, -2, 2));
            args.k_scale = &k_scale, args.v_scale = &v_scale;
        }
    }

    // Text, images of one to three media, alone or side by side; now and then any numbers at all.
    void draw_ranges() {
        rows.resize(int64_t(args.batch) * args.media + 2), first.resize(int64_t(args.batch) * args.positions + 2), phi.resize(first.size());
        for (int64_t& row : rows) row = draw(random, 0, 19) ? draw(random, 0, args.bank_rows - 1) : draw(random, 0, 1) ? -1 : args.bank_rows;
        const bool wild = draw(random, 0, 3) == 0;
        for (int b = 0; b < args.batch; ++b) {
            int64_t from = 0, to = 0;
            bool image = false;
            for (int s = 0; s < args.positions; ++s) {
                const int64_t place = int64_t(b) * args.positions + s;
                const int tiles = draw(random, 1, 3);
                if (draw(random, 0, 3) == 0 && to + tiles <= args.media) {
                    from = image ? from : to + 1, to += tiles, image = true;
                } else {
                    image = false;
                }
                first[place] = from, phi[place] = to;
                if (wild && draw(random, 0, 2) == 0) first[place] = draw(random, -1, args.media + 1), phi[place] = draw(random, -1, args.media + 2);
            }
        }
    }

    std::vector<int64_t> rows_of_query(int64_t place) const {
        std::vector<int64_t> found;
        if (phi[place] < 1 || phi[place] > args.media || first[place] < 1) return found;
        for (int64_t m = first[place]; m <= phi[place]; ++m) {
            const int64_t row = rows[place / args.positions * args.media + m - 1];
            if (row >= 0 && row < args.bank_rows) found.push_back(row);
        }
        return found;
    }

    std::vector<bool> seen_rows() const {
        std::vector<bool> seen(args.bank_rows);
        // What lies between the media of a tile's positions is read too: a block goes from the first to the last of them.
        for (int b = 0; b < args.batch; ++b) {
            int64_t lo = args.media + 1, hi = 0;
            for (int s = 0; s < args.positions; ++s) {
                const int64_t place = int64_t(b) * args.positions + s;
                if (phi[place] < 1 || phi[place] > args.media || first[place] < 1 || first[place] > phi[place]) continue;
                lo = std::min(lo, first[place]), hi = std::max(hi, phi[place]);
            }
            for (int64_t m = lo; m <= hi; ++m) {
                const int64_t row = rows[b * args.media + m - 1];
                if (row >= 0 && row < args.bank_rows) seen[row] = true;
            }
        }
        return seen;
    }

    emulation::Memory inputs() const {
        emulation::Memory memory;
        memory.readable(args.q, tensors[0].bytes);
        memory.readable(args.media_rows, size_t(args.batch) * args.media * 8);
        memory.readable(args.first_media, size_t(args.batch) * args.positions * 8);
        memory.readable(args.phi, size_t(args.batch) * args.positions * 8);
        if (args.k_scale) memory.readable(args.k_scale, 4), memory.readable(args.v_scale, 4);
        const std::vector<bool> seen = seen_rows();
        const size_t size = tensors[1].bytes / args.bank_rows;
        for (int row = 0; row < args.bank_rows; ++row) {
            if (!seen[row]) continue;
            for (const void* bank : {args.k, args.v}) memory.readable(static_cast<const char*>(bank) + row * size, size);
        }
        return memory;
    }

    // Greatest error in units of what rounding the shares and the result once may cost.
    double check() const {
        const int d = args.head_size, group = args.heads / args.kv_heads;
        double worst = 0;
        for (int64_t item = 0; item < int64_t(args.batch) * args.positions * args.heads; ++item) {
            const std::vector<int64_t> seen = rows_of_query(item / args.heads);
            const int64_t head = item % args.heads / group;
            const char* y = static_cast<const char*>(args.y);
            if (seen.empty()) {
                for (int i = 0; i < d; ++i) require(type.get(y, item * d + i) == 0, "a position without a medium is not zero");
                continue;
            }
            std::vector<double> p;
            std::vector<int64_t> starts;
            double greatest = -INFINITY, sum = 0;
            for (int64_t row : seen) {
                for (int r = 0; r < args.keys; ++r) {
                    const int64_t start = ((row * args.kv_heads + head) * args.keys + r) * d;
                    double score = 0;
                    for (int i = 0; i < d; ++i)
                        score += type.get(static_cast<const char*>(args.q), item * d + i) * kv_type.get(static_cast<const char*>(args.k), start + i);
                    p.push_back(score * double(args.scale) * (args.k_scale ? k_scale : 1));
                    starts.push_back(start);
                    greatest = std::max(greatest, p.back());
                }
            }
            for (double& x : p) sum += x = std::exp(x - greatest);
            for (int i = 0; i < d; ++i) {
                double right = 0, size = 0;
                for (size_t r = 0; r < p.size(); ++r) {
                    const double part = p[r] / sum * kv_type.get(static_cast<const char*>(args.v), starts[r] + i) * (args.v_scale ? v_scale : 1);
                    right += part, size += std::fabs(part);
                }
                const double error = std::fabs(type.get(y, item * d + i) - right);
                const double allowed = type.step * (std::fabs(right) + size) + 2e-5 * (1 + size);
                if (!(error <= allowed)) {  // NaN too
                    char line[200];
                    std::snprintf(line, sizeof line, "y[position %d, head %d, %d] is %g and should be %g, give or take %g", int(item / args.heads),
                                  int(item % args.heads), i, type.get(y, item * d + i), right, allowed);
                    throw std::runtime_error(line);
                }
                worst = std::max(worst, error / allowed);
            }
        }
        return worst;
    }

    std::string text() const {
        char line[240];
        std::snprintf(line, sizeof line, "dtypes %d %d, head size %d, %d keys, %d x %d positions, %d heads over %d, %d media, %d rows", type.dtype,
                      kv_type.dtype, args.head_size, args.keys, args.batch, args.positions, args.heads, args.kv_heads, args.media, args.bank_rows);
        return line;
    }
};

double worst = 0;
int cases = 0, blocks = 0, split_cases = 0;

template <class Body>
void launch(const emulation::Memory& memory, int64_t count, int shared_bytes, std::mt19937& random, const Body& body) {
    emulation::Memory used = memory;
    for (int64_t block = 0; block < count; ++block, ++blocks) {
        emulation::Block threads(used, shared_bytes, random);
        threads.run([&](emulation::Machine& machine) { body(machine, block); });
    }
    used.all_written();
}

template <class Body>
void guarded(const RangeCase& test, RangeKernel expected, const Body& body) {
    try {
        require(range_choose(test.args) == expected, "another kernel is chosen");
        body();
        worst = std::max(worst, test.check());
        ++cases;
    } catch (const std::exception& error) {
        std::printf("FAILED %s: %s: %s\n", name_of(expected), test.text().c_str(), error.what());
        std::exit(1);
    }
}

template <class Shape>
void run_case(RangeCase& test) {
    using T = typename Shape::T;
    using KV = typename Shape::KV;
    const RangeKernel kernel = Shape::ROW_TILES == 1 ? RangeKernel::DECODE : RangeKernel::PREFILL;
    guarded(test, kernel, [&] {
        const RangeArgs& args = test.args;
        const int splits = splits_of(args, kernel);
        const int64_t queries = queries_of(args);
        const size_t partial_bytes = size_t(splits * queries * (args.head_size + STATISTICS)) * 4;
        emulation::Memory memory = test.inputs();
        if (splits > 1) {
            require(partial_bytes <= test.tensors[4].bytes, "the workspace is too small");
            memory.result(args.workspace, partial_bytes);
            ++split_cases;
        } else {
            memory.result(args.y, test.tensors[3].bytes);
        }
        launch(memory, unsplit_blocks(args, kernel) * splits, Shape::SHARED_BYTES, test.random, [&](emulation::Machine& machine, int64_t block) {
            RangeBlock<emulation::Machine, Shape>(machine, args, splits, unsigned(block)).run();
        });
        if (splits == 1) return;
        emulation::Memory parts;
        parts.readable(args.workspace, partial_bytes);
        if (args.v_scale) parts.readable(args.v_scale, 4);
        parts.result(args.y, test.tensors[3].bytes);
        launch(parts, up(queries, WARPS), 4, test.random, [&](emulation::Machine& machine, int64_t block) {
            const int64_t query = block * WARPS + machine.warp();
            if (query < queries) join_warp<T, KV>(machine, args, splits, query);
        });
    });
}

template <class Shape>
void run_shape(std::mt19937& random, int count) {
    for (int i = 0; i < count; ++i) {
        const int many[] = {draw(random, 300, 700), 65, draw(random, 1, 64), 129, 320};
        const int group = draw(random, 1, 4), kv_heads = draw(random, 1, 2);
        const int positions = Shape::ROW_TILES == 1 ? draw(random, 1, 16 / group) : 16 / group + draw(random, 1, 40);
        RangeCase test(type_of(typename Shape::T{}), type_of(typename Shape::KV{}), Shape::D, many[i % 5], positions, kv_heads, group, random);
        run_case<Shape>(test);
    }
}

template <class T, class KV, int D>
void run_head_size(std::mt19937& random, int count) {
    run_shape<MmaShape<T, KV, D, 1, false>>(random, count);
    run_shape<MmaShape<T, KV, D, 4, false>>(random, count);
}

template <class KV>
void run_fp32(std::mt19937& random, int count) {
    const int sizes[] = {32, 64, 80, 96, 128};
    for (int i = 0; i < count; ++i) {
        const int group = draw(random, 1, 4);
        RangeCase test(SINGLE, type_of(KV{}), sizes[i % 5], draw(random, 1, 100), draw(random, 1, 12), draw(random, 1, 2), group, random);
        guarded(test, RangeKernel::FP32, [&] {
            emulation::Memory memory = test.inputs();
            memory.result(test.args.y, test.tensors[3].bytes);
            launch(memory, unsplit_blocks(test.args, RangeKernel::FP32), 4, random, [&](emulation::Machine& machine, int64_t block) {
                const int64_t item = block * WARPS + machine.warp();
                if (item < queries_of(test.args)) range_fp32_warp<KV>(machine, test.args, item);
            });
        });
    }
}

// The bound of the workspace holds for every call that is not larger, whatever it is split into.
void check_workspace() {
    RangeArgs largest = {};
    largest.batch = 8, largest.positions = 64, largest.heads = 32, largest.kv_heads = 8, largest.head_size = 128, largest.keys = 1601;
    largest.media = 16, largest.bank_rows = 32, largest.dtype = largest.kv_dtype = FLAMINGO_BFLOAT16;
    const size_t bound = range_workspace(largest);
    for (int batch = 1; batch <= largest.batch; ++batch)
        for (int positions = 1; positions <= largest.positions; ++positions)
            for (int media = 1; media <= largest.media; ++media) {
                RangeArgs args = largest;
                args.batch = batch, args.positions = positions, args.media = media;
                for (RangeKernel kernel : {RangeKernel::DECODE, RangeKernel::PREFILL}) {
                    if ((kernel == RangeKernel::DECODE) != (rows_of(args) <= ROW_TILE)) continue;
                    const int64_t splits = splits_of(args, kernel);
                    require(splits == 1 || size_t(splits * queries_of(args) * (128 + STATISTICS)) * 4 <= bound, "the workspace's bound is too small");
                }
            }
}

}  // namespace

int main(int argc, char** argv) {
    std::mt19937 random(argc > 1 ? std::atoi(argv[1]) : 0);
    const int count = argc > 2 ? std::atoi(argv[2]) : 2;
    check_workspace();
    run_head_size<Bfloat, Bfloat, 128>(random, count);
#ifndef ONE_SHAPE
    run_head_size<Half, E4m3, 128>(random, count);
    run_head_size<Half, Half, 96>(random, count);
    run_head_size<Bfloat, E4m3, 96>(random, count);
    run_head_size<Bfloat, Bfloat, 80>(random, count);
    run_head_size<Half, E4m3, 80>(random, count);
    run_head_size<Half, Half, 64>(random, count);
    run_head_size<Bfloat, E4m3, 64>(random, count);
    run_head_size<Bfloat, Bfloat, 32>(random, count);
    run_head_size<Half, E4m3, 32>(random, count);
    run_fp32<Single>(random, count * 2);
    run_fp32<E4m3>(random, count * 2);
#endif
    std::printf("%d cases, %d of them split, %d blocks: worst error %.2f of what is allowed\n", cases, split_cases, blocks, worst);
}
