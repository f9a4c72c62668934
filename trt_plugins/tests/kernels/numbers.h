// 16-bit and 8-bit floats in software, rounded to nearest, ties to even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace numbers {

// A format with `exponent` and `mantissa` bits that keeps infinities where IEEE 754 has them.
struct Format {
    int exponent, mantissa;

    int bias() const { return (1 << (exponent - 1)) - 1; }

    double decode(uint32_t bits) const {
        const double sign = bits >> (exponent + mantissa) & 1 ? -1 : 1;
        const int e = bits >> mantissa & ((1 << exponent) - 1), m = bits & ((1 << mantissa) - 1);
        if (e == (1 << exponent) - 1) return m ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
        if (e == 0) return sign * std::ldexp(m, 1 - bias() - mantissa);
        return sign * std::ldexp((1 << mantissa) + m, e - bias() - mantissa);
    }

    uint32_t encode(double x) const {
        const uint32_t sign = uint32_t(std::signbit(x)) << (exponent + mantissa), infinity = ((1u << exponent) - 1) << mantissa;
        if (std::isnan(x)) return infinity | ((1u << mantissa) - 1);
        x = std::fabs(x);
        if (std::isinf(x)) return sign | infinity;
        if (x == 0) return sign;
        const int power = std::max(std::ilogb(x), 1 - bias());            // of the number's unit
        const double units = std::nearbyint(std::ldexp(x, mantissa - power));  // 2^mantissa and more where normal
        const double normal = std::ldexp(1, mantissa);
        if (units < normal) return sign | uint32_t(units);
        const uint32_t bits = (uint32_t(power + bias()) << mantissa) + uint32_t(units - normal);  // may carry into the exponent
        return sign | (bits < infinity ? bits : infinity);
    }
};

constexpr Format HALF = {5, 10}, BFLOAT = {8, 7};

// All numbers of a format of 16 bits: decoding is most of the emulator's work.
inline const double* decoded(const Format& format) {
    static std::vector<double> tables[2];
    std::vector<double>& table = tables[format.exponent == HALF.exponent];
    if (table.empty())
        for (uint32_t bits = 0; bits < 65536; ++bits) table.push_back(format.decode(bits));
    return table.data();
}

// E4M3 as OCP and NVIDIA define it: no infinities, NaN is all ones.
inline double decode_e4m3(uint32_t bits) {
    const double sign = bits & 0x80 ? -1 : 1;
    const int e = bits >> 3 & 15, m = bits & 7;
    if (e == 15 && m == 7) return std::numeric_limits<double>::quiet_NaN();
    return sign * (e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10));
}

// Nearest number, saturated at 448.
inline uint32_t encode_e4m3(double x) {
    uint32_t best = 0;
    for (uint32_t bits = 1; bits < 0x7f; ++bits) {
        const double there = std::fabs(decode_e4m3(bits) - std::fabs(x)), before = std::fabs(decode_e4m3(best) - std::fabs(x));
        if (there < before || (there == before && bits % 2 == 0)) best = bits;
    }
    return best | (std::signbit(x) ? 0x80 : 0);
}

}  // namespace numbers
