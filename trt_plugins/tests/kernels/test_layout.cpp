// Properties of the layout that do not need a block: no bank conflicts, no two things in one place, FP8 widened right, what is refused.
#include <cstdio>
#include <cstdlib>
#include <set>

#include "choose.h"
#include "emulator.h"

namespace {

using namespace flamingo;

void require(bool fact, const char* what) {
    if (fact) return;
    std::printf("FAILED: %s\n", what);
    std::exit(1);
}

void shared_chunks() {
    for (int chunks : {2, 4, 5, 6, 8, 10, 12, 16}) {  // rows of head sizes 32, 64, 80, 96, 128 in one and two bytes
        std::set<uint32_t> places;
        for (int row = 0; row < SLICE; ++row)
            for (int chunk = 0; chunk < chunks; ++chunk) places.insert(shared_chunk(row, chunk, chunks));
        require(int(places.size()) == SLICE * chunks && *places.rbegin() == uint32_t(SLICE * chunks - 1) * CHUNK, "chunks share a place, or leave the tile");
        for (int row = 0; row < SLICE; row += 8) {
            for (int chunk = 0; chunk < chunks; ++chunk) {
                std::set<uint32_t> banks;
                for (int i = 0; i < 8; ++i) banks.insert(shared_chunk(row + i, chunk, chunks) / CHUNK % 8);
                require(banks.size() == 8, "rows of a matrix meet in a bank");
            }
        }
    }
}

// Stores and loads of eight bytes go in two halves of a warp; each must touch all 32 banks once.
void exchange() {
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; i += 2) {
            std::set<uint32_t> banks;
            for (int lane = half * 16; lane < half * 16 + 16; ++lane) {
                const Cell cell = accumulator_cell(lane, i);
                for (uint32_t word : {0, 1}) banks.insert((exchange_offset(cell.row, cell.column) / 4 + word) % 32);
            }
            require(banks.size() == 32, "exchanged scores meet in a bank");
        }
    }
}

void accumulators() {
    std::set<int> cells;
    for (int lane = 0; lane < WARP; ++lane)
        for (int i = 0; i < 4; ++i) cells.insert(accumulator_cell(lane, i).row * 8 + accumulator_cell(lane, i).column);
    require(cells.size() == 128 && *cells.rbegin() == 127, "accumulators do not cover 16 x 8");
}

void fp8() {
    std::mt19937 random(0);
    emulation::Memory memory;
    emulation::Block block(memory, 4, random);
    emulation::Machine machine(block, 0);
    for (uint32_t two = 0; two < 65536; ++two) {
        const uint32_t got = widen_by_bits(machine, two);
        for (int i = 0; i < 2; ++i) {
            const double right = numbers::decode_e4m3(two >> 8 * i & 0xff), x = numbers::HALF.decode(got >> 16 * i & 0xffff);
            require(x == right || (std::isnan(x) && std::isnan(right)), "E4M3 widened wrongly");
        }
    }
}

void refusals() {
    alignas(16) static char memory[64];
    const int64_t* numbers = reinterpret_cast<const int64_t*>(memory);
    const float* scale = reinterpret_cast<const float*>(memory);
    const Args good = {memory, memory, memory, numbers, numbers, nullptr, nullptr, memory, 2, 40, 4, 64, 64, 3, 5, 0.125f, FLAMINGO_FLOAT16, FLAMINGO_FLOAT16};
    const auto with = [&](auto change) {
        Args args = good;
        change(args);
        return choose(args);
    };
    require(choose(good) == Kernel::PREFILL, "prefill");
    require(with([](Args& a) { a.positions = 16; }) == Kernel::DECODE, "decode");
    require(with([](Args& a) { a.positions = 17, a.latents = 65; }) == Kernel::PREFILL_SLICED, "slices");
    require(with([](Args& a) { a.dtype = a.kv_dtype = FLAMINGO_FLOAT32; }) == Kernel::FP32, "fp32");
    require(with([&](Args& a) { a.kv_dtype = FLAMINGO_FLOAT8_E4M3, a.k_scale = scale; }) == Kernel::PREFILL, "FP8");
    require(with([](Args& a) { a.batch = 0; }) == Kernel::NOTHING, "nothing to do");
    require(with([](Args& a) { a.bank_rows = 0, a.k = a.v = nullptr; }) == Kernel::PREFILL, "an empty bank");
    require(with([](Args& a) { a.head_size = 72; }) == Kernel::REFUSED, "head size");
    require(with([](Args& a) { a.kv_dtype = FLAMINGO_BFLOAT16; }) == Kernel::REFUSED, "mixed types");
    require(with([](Args& a) { a.dtype = a.kv_dtype = FLAMINGO_FLOAT8_E4M3; }) == Kernel::REFUSED, "FP8 queries");
    require(with([](Args& a) { a.dtype = flamingo_dtype(9); }) == Kernel::REFUSED, "unknown type");
    require(with([&](Args& a) { a.k_scale = scale; }) == Kernel::REFUSED, "scales without FP8");
    require(with([](Args& a) { a.latents = 0; }) == Kernel::REFUSED, "no latents");
    require(with([](Args& a) { a.positions = -1; }) == Kernel::REFUSED, "negative size");
    require(with([](Args& a) { a.q = memory + 8; }) == Kernel::REFUSED, "alignment");
    require(with([](Args& a) { a.k = nullptr; }) == Kernel::REFUSED, "no keys");
    require(with([](Args& a) { a.batch = INT32_MAX, a.positions = INT32_MAX; }) == Kernel::REFUSED, "more blocks than a grid holds");
}

}  // namespace

int main() {
    shared_chunks();
    exchange();
    accumulators();
    fp8();
    refusals();
    std::printf("layout as it should be\n");
}
