// The kernels' own code, thread by thread on the CPU, against a plain fp64 loop, on random ragged cases.
//
//   test_blocks SEED CASES      of each shape: sequences of runs as few-shot prompts have them, shuffled media, positions without a medium,
//                               media and rows out of range, rows past the last one, latents that fill no tile, NaN in all that is not read
#include <cstdio>
#include <cstdlib>

#include "cases.h"
#include "choose.h"
#include "emulator.h"
#include "fp32_warp.h"

namespace {

using namespace flamingo;
using emulation::require;

struct Case {
    Type type, kv_type;
    std::mt19937& random;
    Args args = {};
    std::vector<Tensor> tensors;
    std::vector<int64_t> rows, phi;
    float k_scale = 0, v_scale = 0;

    double normal() { return std::normal_distribution<double>()(random); }

    Case(Type t, Type kv, int head_size, int latents, int positions, std::mt19937& r) : type(t), kv_type(kv), random(r) {
        args.batch = draw(r, 1, 2), args.positions = positions, args.heads = draw(r, 1, 3), args.head_size = head_size, args.latents = latents;
        args.media = draw(r, 0, 5), args.bank_rows = draw(r, 0, 5), args.dtype = type.dtype, args.kv_dtype = kv_type.dtype;
        args.scale = float(draw(r, 1, 3) / std::sqrt(head_size));
        if (draw(r, 0, 9) == 0) args.scale = -args.scale;
        draw_phi();
        const int64_t queries = int64_t(args.batch) * args.positions * args.heads * head_size;
        const int64_t row = int64_t(args.heads) * latents * head_size;
        tensors.reserve(4);
        for (int64_t size : {queries * type.bytes, args.bank_rows * row * kv_type.bytes, args.bank_rows * row * kv_type.bytes, queries * type.bytes})
            tensors.emplace_back(size);
        for (int64_t i = 0; i < queries; ++i) {
            if (medium_row(i / (int64_t(args.heads) * head_size)) < 0) type.set_nan(tensors[0].data(), i);
            else type.set(tensors[0].data(), i, normal());
        }
        for (int64_t i = 0; i < args.bank_rows * row; ++i) {
            const bool seen = is_seen(i / row);
            for (int which : {1, 2}) seen ? kv_type.set(tensors[which].data(), i, normal()) : kv_type.set_nan(tensors[which].data(), i);
        }
        std::memset(tensors[3].data(), 0xff, tensors[3].bytes);
        args.q = tensors[0].data(), args.k = tensors[1].data(), args.v = tensors[2].data(), args.y = tensors[3].data();
        args.media_rows = rows.data(), args.phi = phi.data();
        if (kv.dtype == FLAMINGO_FLOAT8_E4M3 && draw(r, 0, 2)) k_scale = 0.75f, v_scale = 1.5f, args.k_scale = &k_scale, args.v_scale = &v_scale;
    }

    void draw_phi() {
        rows.reserve(1 + size_t(args.batch) * args.media);
        for (int i = 0; i < args.batch * args.media; ++i) rows.push_back(draw(random, 0, 19) ? draw(random, 0, std::max(0, args.bank_rows - 1)) : draw(random, 0, 1) ? -1 : args.bank_rows);
        const int style = draw(random, 0, 3);
        for (int b = 0; b < args.batch; ++b) {
            int64_t now = draw(random, 0, 1);
            for (int s = 0; s < args.positions; ++s) {
                if (style == 0) now = draw(random, -1, args.media + 1);                                // no order at all
                if (style == 1 && draw(random, 0, 15) == 0 && now < args.media) ++now;                 // a prompt
                if (style == 2) now = args.media;                                                      // decoding
                if (style == 3) now = draw(random, 0, 3) ? 0 : args.media;
                phi.push_back(now);
            }
        }
    }

    int64_t medium_row(int64_t place) const {
        const int64_t medium = phi[place];
        if (medium < 1 || medium > args.media) return -1;
        const int64_t row = rows[place / args.positions * args.media + medium - 1];
        return row < args.bank_rows ? row : -1;
    }
    bool is_seen(int64_t row) const {
        for (size_t place = 0; place < phi.size(); ++place)
            if (medium_row(place) == row) return true;
        return false;
    }

    emulation::Memory memory() const {
        emulation::Memory memory;
        memory.readable(phi.data(), phi.size() * 8);
        memory.readable(rows.data(), rows.size() * 8);
        memory.readable(args.q, tensors[0].bytes);
        memory.readable(&k_scale, 4);
        memory.readable(&v_scale, 4);
        const int64_t size = int64_t(args.heads) * args.latents * args.head_size * kv_type.bytes;
        for (int64_t row = 0; row < args.bank_rows; ++row) {
            if (!is_seen(row)) continue;
            for (const void* bank : {args.k, args.v}) memory.readable(static_cast<const char*>(bank) + row * size, size);
        }
        memory.result(args.y, tensors[3].bytes);
        return memory;
    }

    // Greatest error in units of what rounding the shares and the result once may cost.
    double check() {
        const int d = args.head_size;
        double worst = 0;
        std::vector<double> p(args.latents);
        for (int64_t item = 0; item < int64_t(phi.size()) * args.heads; ++item) {
            const int64_t row = medium_row(item / args.heads), start = (row * args.heads + item % args.heads) * args.latents * d;
            const char* y = static_cast<const char*>(args.y);
            if (row < 0) {
                for (int i = 0; i < d * type.bytes; ++i) require(y[item * d * type.bytes + i] == 0, "a position without a medium is not zero");
                continue;
            }
            double greatest = -INFINITY, sum = 0;
            for (int r = 0; r < args.latents; ++r) {
                p[r] = 0;
                for (int i = 0; i < d; ++i) p[r] += type.get(static_cast<const char*>(args.q), item * d + i) * kv_type.get(static_cast<const char*>(args.k), start + r * d + i);
                p[r] *= double(args.scale) * (args.k_scale ? k_scale : 1);
                greatest = std::max(greatest, p[r]);
            }
            for (double& x : p) sum += x = std::exp(x - greatest);
            for (int i = 0; i < d; ++i) {
                double right = 0, size = 0;
                for (int r = 0; r < args.latents; ++r) {
                    const double part = p[r] / sum * kv_type.get(static_cast<const char*>(args.v), start + r * d + i) * (args.v_scale ? v_scale : 1);
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
        char line[200];
        std::snprintf(line, sizeof line, "dtypes %d %d, head size %d, %d latents, %d x %d positions, %d heads, %d media, %d rows", type.dtype,
                      kv_type.dtype, args.head_size, args.latents, args.batch, args.positions, args.heads, args.media, args.bank_rows);
        return line;
    }
};

double worst = 0;
int cases = 0, blocks = 0;

template <class Run>
void run_case(Case& test, Kernel expected, int shared_bytes, const Run& run) {
    try {
        require(choose(test.args) == expected, "another kernel is chosen");
        emulation::Memory memory = test.memory();
        for (int64_t block = 0; block < blocks_of(test.args, expected); ++block, ++blocks) {
            emulation::Block threads(memory, shared_bytes, test.random);
            threads.run([&](emulation::Machine& machine) { run(machine, test.args, block); });
        }
        memory.all_written();
        worst = std::max(worst, test.check());
        ++cases;
    } catch (const std::exception& error) {
        std::printf("FAILED %s: %s: %s\n", name_of(expected), test.text().c_str(), error.what());
        std::exit(1);
    }
}

template <class Shape>
void run_shape(std::mt19937& random, int count) {
    const Kernel kernel = Shape::ROW_TILES == 1 ? Kernel::DECODE : Shape::ONE_PASS ? Kernel::PREFILL : Kernel::PREFILL_SLICED;
    for (int i = 0; i < count; ++i) {
        const int few[] = {64, 16, 1, 63, draw(random, 2, 62)}, many[] = {100, 128, 65, 129, draw(random, 66, 200)};
        const bool sliced = kernel == Kernel::PREFILL_SLICED || (kernel == Kernel::DECODE && i % 2);
        const int latents = (sliced ? many : few)[random() % 5];
        const int positions = kernel == Kernel::DECODE ? (i % 3 ? draw(random, 1, 16) : 3) : (i % 3 ? draw(random, 17, 140) : 64);
        Case test(type_of(typename Shape::T{}), type_of(typename Shape::KV{}), Shape::D, latents, positions, random);
        run_case(test, kernel, Shape::SHARED_BYTES, [](emulation::Machine& machine, const Args& args, int64_t block) {
            MmaBlock<emulation::Machine, Shape>(machine, args, block).run();
        });
    }
}

template <class T, class KV, int D>
void run_head_size(std::mt19937& random, int count) {
    run_shape<MmaShape<T, KV, D, 4, true>>(random, count);
    run_shape<MmaShape<T, KV, D, 4, false>>(random, count);
    run_shape<MmaShape<T, KV, D, 1, false>>(random, count);
}

template <class KV>
void run_fp32(std::mt19937& random, int count) {
    const int sizes[] = {32, 64, 80, 96, 128};
    for (int i = 0; i < count; ++i) {
        Case test(SINGLE, type_of(KV{}), sizes[i % 5], draw(random, 1, 100), draw(random, 1, 20), random);
        run_case(test, Kernel::FP32, 4, [](emulation::Machine& machine, const Args& args, int64_t block) {
            const int64_t item = block * WARPS + machine.warp();
            if (item < int64_t(args.batch) * args.positions * args.heads) fp32_warp<KV>(machine, args, item);
        });
    }
}

}  // namespace

int main(int argc, char** argv) {
    std::mt19937 random(argc > 1 ? std::atoi(argv[1]) : 0);
    const int count = argc > 2 ? std::atoi(argv[2]) : 2;
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
    std::printf("%d cases, %d blocks: worst error %.2f of what is allowed\n", cases, blocks, worst);
}
