// What random cases of the kernels are made of: tensors of each type on the host.
#pragma once

#include "emulator.h"
#include "fp32_warp.h"

namespace {

using namespace flamingo;

struct Tensor {  // 16-byte aligned
    std::vector<uint64_t> memory;
    size_t bytes;
    explicit Tensor(size_t size) : memory((size + 23) / 16 * 2, 0), bytes(size) {}
    char* data() { return reinterpret_cast<char*>(memory.data()); }
};

struct Type {
    flamingo_dtype dtype;
    int bytes;
    double step;  // what rounding may change, relative

    double get(const char* p, int64_t i) const {
        uint32_t bits = 0;
        std::memcpy(&bits, p + i * bytes, bytes);
        if (dtype == FLAMINGO_FLOAT32) return emulation::Machine::as_float(bits);
        if (dtype == FLAMINGO_FLOAT16) return numbers::HALF.decode(bits);
        return dtype == FLAMINGO_BFLOAT16 ? numbers::BFLOAT.decode(bits) : numbers::decode_e4m3(bits);
    }
    void set(char* p, int64_t i, double x) const {
        const uint32_t bits = dtype == FLAMINGO_FLOAT32    ? emulation::Machine::as_bits(float(x))
                              : dtype == FLAMINGO_FLOAT16  ? numbers::HALF.encode(x)
                              : dtype == FLAMINGO_BFLOAT16 ? numbers::BFLOAT.encode(x)
                                                           : numbers::encode_e4m3(x);
        std::memcpy(p + i * bytes, &bits, bytes);
    }
    void set_nan(char* p, int64_t i) const { std::memset(p + i * bytes, dtype == FLAMINGO_FLOAT8_E4M3 ? 0x7f : 0xff, bytes); }
};

inline const Type SINGLE = {FLAMINGO_FLOAT32, 4, 1e-7}, HALF = {FLAMINGO_FLOAT16, 2, 1.0 / 2048}, BFLOAT = {FLAMINGO_BFLOAT16, 2, 1.0 / 256},
           FP8 = {FLAMINGO_FLOAT8_E4M3, 1, 0};
inline Type type_of(Half) { return HALF; }
inline Type type_of(Bfloat) { return BFLOAT; }
inline Type type_of(Single) { return SINGLE; }
inline Type type_of(E4m3) { return FP8; }

inline int draw(std::mt19937& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

}  // namespace
