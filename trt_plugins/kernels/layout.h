// Where things stand: pieces of mma.sync.m16n8k16 in the lanes of a warp, rows that ldmatrix reads, 16-byte chunks in shared memory.
// Constant functions of integers, used by the kernels and by their emulation on the host.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FLAMINGO_FUNCTION __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")
#else
#define FLAMINGO_FUNCTION inline
#define UNROLL
#define ROLL
#endif

namespace flamingo {

constexpr int WARP = 32;
constexpr int WARPS = 4;             // of a block
constexpr int THREADS = WARPS * WARP;
constexpr int ROW_TILE = 16;         // rows of one mma
constexpr int SLICE = 64;            // keys held in shared memory at a time
constexpr int GROUP = 32;            // head dimensions that a quad of lanes reads or writes at once: four chunks of 16-bit numbers
constexpr int CHUNK = 16;            // bytes

// The chunk's place in a tile of `chunks` chunks a row. Eight lanes that read one chunk of eight successive rows (ldmatrix) meet eight
// different groups of four banks: rows repeat their banks every 8 / period rows, and that often the chunks are permuted anew.
FLAMINGO_FUNCTION constexpr uint32_t shared_chunk(int row, int chunk, int chunks) {
    const int period = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
    return uint32_t(row * chunks + (chunk ^ (row / (8 / period) % period))) * CHUNK;
}

struct Cell {
    int row, column;
};

// Row and column of number i (0..3) of a lane's accumulators: a quad of lanes has a row, and the row eight below it.
FLAMINGO_FUNCTION constexpr Cell accumulator_cell(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// Which key and chunk a lane points ldmatrix at: lane 8 i + r at row r of the i-th 8 x 8 matrix. 16 keys by 16 head dimensions each time;
// those are two chunks of 16-bit numbers or one of FP8.
FLAMINGO_FUNCTION constexpr Cell k_address(int lane, int keys16, int step) {
    return {keys16 * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2};
}
FLAMINGO_FUNCTION constexpr Cell v_address(int lane, int keys16, int step) {
    return {keys16 * 16 + lane / 8 % 2 * 8 + lane % 8, step * 2 + lane / 16};
}
FLAMINGO_FUNCTION constexpr Cell fp8_address(int lane, int keys16, int step) { return {keys16 * 16 + lane % 16, step}; }

// Scores that the warps of a decode block exchange: [16 rows][64 keys] of fp32, rows padded so that a quarter's stores meet no bank twice.
constexpr int EXCHANGE_STRIDE = SLICE + 8;
constexpr int EXCHANGE_BYTES = ROW_TILE * EXCHANGE_STRIDE * 4;
FLAMINGO_FUNCTION constexpr uint32_t exchange_offset(int row, int key) { return uint32_t(row * EXCHANGE_STRIDE + key) * 4; }

}  // namespace flamingo
