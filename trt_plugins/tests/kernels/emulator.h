// A Machine for the kernels' code on a CPU: the threads of a block as fibers, in an order drawn anew between barriers.
//
// Warp instructions follow NVIDIA's PTX manual (ldmatrix, mma.m16n8k16, shfl, vote), not our layout.h. Beyond computing, it refuses what a GPU
// would do wrongly in silence: reads and writes outside of the memory that the case allows, results written twice or never, lanes at
// different instructions, barriers that not all reach, shared memory that is read before it is written or while a copy into it is under way,
// accesses of two threads to one word without a barrier between them, and ldmatrix whose rows meet in a bank.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "mma_block.h"
#include "numbers.h"

namespace emulation {

using flamingo::Bfloat;
using flamingo::Half;
using flamingo::THREADS;
using flamingo::WARP;
using flamingo::WARPS;

inline void require(bool fact, const char* what) {
    if (!fact) throw std::runtime_error(what);
}

// Device memory that a case may touch.
class Memory {
    struct Range {
        const char* begin;
        size_t size;
    };
    std::vector<Range> readable_;
    const char* y_ = nullptr;
    std::vector<uint8_t> written_;

public:
    void readable(const void* p, size_t size) { readable_.push_back({static_cast<const char*>(p), size}); }
    void result(const void* p, size_t size) {
        y_ = static_cast<const char*>(p);
        written_.assign(size, 0);
    }

    void read(const void* p, size_t size) const {
        const char* at = static_cast<const char*>(p);
        require(reinterpret_cast<uintptr_t>(p) % size == 0, "unaligned read");
        for (const Range& range : readable_)
            if (at >= range.begin && at + size <= range.begin + range.size) return;
        throw std::runtime_error("read outside of what the case allows");
    }

    void write(const void* p, size_t size) {
        const char* at = static_cast<const char*>(p);
        require(reinterpret_cast<uintptr_t>(p) % size == 0, "unaligned write");
        require(at >= y_ && at + size <= y_ + written_.size(), "write outside of the result");
        for (size_t i = 0; i < size; ++i) require(!written_[at - y_ + i]++, "result written twice");
    }

    void all_written() const {
        for (uint8_t count : written_) require(count == 1, "result not written");
    }
};

// Shared memory with what is known of each word.
class Shared {
    struct Word {
        uint32_t bits;
        int writer = -1, reader = -1;
        long written = -1, read = -1;  // after which barrier
        bool pending = false;
    };
    static constexpr int SEVERAL = -2;
    std::vector<Word> words_;

    Word& at(uint32_t offset) {
        require(offset % 4 == 0 && offset / 4 < words_.size(), "outside of shared memory");
        return words_[offset / 4];
    }

public:
    long barriers = 0;

    explicit Shared(int bytes) : words_(bytes / 4) {}

    uint32_t read(uint32_t offset, int thread) {
        Word& word = at(offset);
        require(!word.pending, "shared memory read while a copy into it is under way");
        require(word.writer >= 0, "shared memory read before it is written");
        require(word.writer == thread || word.written < barriers, "race: read after a write, no barrier between");
        word.reader = word.read == barriers && word.reader != thread ? SEVERAL : thread;
        word.read = barriers;
        return word.bits;
    }

    void begin_write(uint32_t offset, int thread) {
        Word& word = at(offset);
        require(!word.pending, "race: two writes at once");
        require(word.read < barriers || word.reader == thread, "race: write after a read, no barrier between");
        require(word.written < barriers || word.writer == thread, "race: write after a write, no barrier between");
        word.pending = true;
    }

    void end_write(uint32_t offset, int thread, uint32_t bits) {
        Word& word = at(offset);
        word.bits = bits;
        word.writer = thread;
        word.written = barriers;
        word.pending = false;
    }
};

struct Gathering {  // of threads at an instruction that they execute together
    int arrived = 0;
    long generation = 0;
    const char* kind = "";
};

class Block;

class Machine {
    Block& block_;
    int thread_;
    struct Copy {
        uint32_t to;
        uint32_t bits[4];
    };
    std::vector<std::vector<Copy>> groups_{1};  // oldest first; the last is not committed yet

    template <int N>
    void matrices(uint32_t from, uint32_t (&r)[N], bool transposed);
    void products(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const numbers::Format& format);

public:
    Machine(Block& block, int thread) : block_(block), thread_(thread) {}

    int thread() const { return thread_; }
    int lane() const { return thread_ % WARP; }
    int warp() const { return thread_ / WARP; }
    void forget() {}
    void sync();

    uint32_t shuffle(uint32_t x, int lane);
    int shuffle(int x, int lane) { return int(shuffle(uint32_t(x), lane)); }
    float shuffle(float x, int lane) { return as_float(shuffle(as_bits(x), lane)); }
    template <class X>
    X shuffle_xor(X x, int mask) { return shuffle(x, lane() ^ mask); }
    uint64_t ballot(bool x);
    int first_bit(uint64_t x) { return __builtin_ctzll(x); }

    int64_t load_i64(const int64_t* p);
    float load_f32(const float* p);
    float load_e4m3(const uint8_t* p);
    void load16(const char* p, uint32_t (&x)[4]);
    void load8(const char* p, uint32_t& low, uint32_t& high);
    void store16(char* p, const uint32_t (&x)[4]);
    void store8(char* p, uint32_t low, uint32_t high);
    void store_f32(float* p, float x);

    void copy16(uint32_t to, const char* from, bool there);
    void commit() { groups_.emplace_back(); }
    void wait_for_older();

    void store_shared(uint32_t to, float x, float y);
    void load_shared(uint32_t from, float& x, float& y);
    template <int N>
    void load_matrices(uint32_t from, uint32_t (&r)[N]) { matrices(from, r, false); }
    template <int N>
    void load_matrices_transposed(uint32_t from, uint32_t (&r)[N]) { matrices(from, r, true); }

    void mma(Half, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { products(d, a, b, numbers::HALF); }
    void mma(Bfloat, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { products(d, a, b, numbers::BFLOAT); }

    static uint32_t as_bits(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits;
    }
    static float as_float(uint32_t bits) {
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    uint32_t pack(Half, float low, float high) { return numbers::HALF.encode(low) | numbers::HALF.encode(high) << 16; }
    uint32_t pack(Bfloat, float low, float high) { return numbers::BFLOAT.encode(low) | numbers::BFLOAT.encode(high) << 16; }
    uint32_t multiply(Half, uint32_t x, uint32_t y) {
        const numbers::Format& half = numbers::HALF;
        return half.encode(half.decode(x & 0xffff) * half.decode(y & 0xffff)) | half.encode(half.decode(x >> 16) * half.decode(y >> 16)) << 16;
    }
    uint32_t widen(Half, uint32_t two) { return flamingo::widen_by_bits(*this, two); }
    uint32_t widen(Bfloat, uint32_t two) {
        return pack(Bfloat{}, float(numbers::decode_e4m3(two & 0xff)), float(numbers::decode_e4m3(two >> 8 & 0xff)));
    }

    float exp2(float x) { return std::exp2(x); }
    float reciprocal(float x) { return 1 / x; }
    float max(float x, float y) { return std::fmax(x, y); }
    float infinity() { return std::numeric_limits<float>::infinity(); }
};

// Runs one body on all threads of a block.
class Block {
    friend class Machine;
    struct Fiber {
        ucontext_t context;
        std::vector<char> stack = std::vector<char>(128 * 1024);
        const Gathering* waits = nullptr;
        long generation = 0;
        bool done = false;
    };
    Memory& memory_;
    Shared shared_;
    std::mt19937& random_;
    ucontext_t scheduler_;
    std::vector<Fiber> fibers_{THREADS};
    std::vector<Machine> machines_;
    Gathering warps_[WARPS], all_;
    uint64_t in_[THREADS][8] = {}, out_[THREADS][4] = {};  // operands and results of instructions that a warp executes together
    std::function<void(Machine&)> body_;
    std::string failure_;
    int current_ = 0;

    static Block*& active() {
        static Block* block = nullptr;
        return block;
    }
    static void enter() {
        Block& block = *active();
        const int thread = block.current_;
        try {
            block.body_(block.machines_[thread]);
        } catch (const std::exception& error) {
            block.failure_ = "thread " + std::to_string(thread) + ": " + error.what();
        }
        block.fibers_[thread].done = true;
        swapcontext(&block.fibers_[thread].context, &block.scheduler_);
    }

    // Waits for `count` threads; the last to come does the work of all.
    void gather(Gathering& place, int count, int thread, const char* kind, const std::function<void()>& work) {
        if (place.arrived && std::strcmp(place.kind, kind)) throw std::runtime_error(std::string("threads at different instructions: ") + place.kind + ", " + kind);
        place.kind = kind;
        if (++place.arrived == count) {
            work();
            place.arrived = 0;
            ++place.generation;
            return;
        }
        fibers_[thread].waits = &place;
        fibers_[thread].generation = place.generation;
        swapcontext(&fibers_[thread].context, &scheduler_);
    }
    void gather_warp(int thread, const char* kind, const std::function<void()>& work) {
        gather(warps_[thread / WARP], WARP, thread, kind, work);
    }

public:
    Block(Memory& memory, int shared_bytes, std::mt19937& random) : memory_(memory), shared_(shared_bytes), random_(random) {
        for (int thread = 0; thread < THREADS; ++thread) machines_.emplace_back(*this, thread);
    }

    void run(const std::function<void(Machine&)>& body) {
        body_ = body;
        active() = this;
        for (Fiber& fiber : fibers_) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, enter, 0);
        }
        int order[THREADS];
        for (int i = 0; i < THREADS; ++i) order[i] = i;
        for (int left = THREADS; left > 0;) {
            std::shuffle(order, order + THREADS, random_);
            bool moved = false;
            for (int thread : order) {
                Fiber& fiber = fibers_[thread];
                if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) continue;
                fiber.waits = nullptr;
                moved = true;
                current_ = thread;
                swapcontext(&scheduler_, &fiber.context);
                require(failure_.empty(), failure_.c_str());
                left -= fiber.done;
            }
            require(moved, "threads wait for others that never come");
        }
    }
};

inline void Machine::sync() {
    block_.gather(block_.all_, THREADS, thread_, "barrier", [&] { ++block_.shared_.barriers; });
}

inline uint32_t Machine::shuffle(uint32_t x, int lane) {
    const int base = warp() * WARP;
    block_.in_[thread_][0] = x;
    block_.in_[thread_][1] = uint64_t(lane);
    block_.gather_warp(thread_, "shuffle", [&, base] {
        for (int i = base; i < base + WARP; ++i) block_.out_[i][0] = block_.in_[base + block_.in_[i][1] % WARP][0];
    });
    return uint32_t(block_.out_[thread_][0]);
}

inline uint64_t Machine::ballot(bool x) {
    const int base = warp() * WARP;
    block_.in_[thread_][0] = x;
    block_.gather_warp(thread_, "ballot", [&, base] {
        uint64_t votes = 0;
        for (int i = 0; i < WARP; ++i) votes |= block_.in_[base + i][0] << i;
        for (int i = 0; i < WARP; ++i) block_.out_[base + i][0] = votes;
    });
    return block_.out_[thread_][0];
}

inline int64_t Machine::load_i64(const int64_t* p) {
    block_.memory_.read(p, 8);
    return *p;
}
inline float Machine::load_f32(const float* p) {
    block_.memory_.read(p, 4);
    return *p;
}
inline float Machine::load_e4m3(const uint8_t* p) {
    block_.memory_.read(p, 1);
    return float(numbers::decode_e4m3(*p));
}
inline void Machine::load16(const char* p, uint32_t (&x)[4]) {
    block_.memory_.read(p, 16);
    std::memcpy(x, p, 16);
}
inline void Machine::load8(const char* p, uint32_t& low, uint32_t& high) {
    block_.memory_.read(p, 8);
    std::memcpy(&low, p, 4);
    std::memcpy(&high, p + 4, 4);
}
inline void Machine::store16(char* p, const uint32_t (&x)[4]) {
    block_.memory_.write(p, 16);
    std::memcpy(p, x, 16);
}
inline void Machine::store8(char* p, uint32_t low, uint32_t high) {
    block_.memory_.write(p, 8);
    std::memcpy(p, &low, 4);
    std::memcpy(p + 4, &high, 4);
}
inline void Machine::store_f32(float* p, float x) {
    block_.memory_.write(p, 4);
    *p = x;
}

inline void Machine::copy16(uint32_t to, const char* from, bool there) {
    Copy copy = {to, {0, 0, 0, 0}};
    require(to % 16 == 0, "unaligned copy to shared memory");
    if (there) {
        block_.memory_.read(from, 16);
        std::memcpy(copy.bits, from, 16);
    }
    for (int i = 0; i < 4; ++i) block_.shared_.begin_write(to + 4 * i, thread_);
    groups_.back().push_back(copy);
}
inline void Machine::wait_for_older() {  // committed groups but the newest; copies that nobody waits for stay under way
    while (groups_.size() > 2) {
        for (const Copy& copy : groups_.front())
            for (int i = 0; i < 4; ++i) block_.shared_.end_write(copy.to + 4 * i, thread_, copy.bits[i]);
        groups_.erase(groups_.begin());
    }
}

inline void Machine::store_shared(uint32_t to, float x, float y) {
    const float pair[2] = {x, y};
    for (int i = 0; i < 2; ++i) {
        block_.shared_.begin_write(to + 4 * i, thread_);
        block_.shared_.end_write(to + 4 * i, thread_, as_bits(pair[i]));
    }
}
inline void Machine::load_shared(uint32_t from, float& x, float& y) {
    x = as_float(block_.shared_.read(from, thread_));
    y = as_float(block_.shared_.read(from + 4, thread_));
}

// ldmatrix.m8n8.xN.b16: lane 8 i + r names row r of matrix i; lane t gets elements 2 (t % 4) and the next of row t / 4 of each, or of that
// column when transposed.
template <int N>
void Machine::matrices(uint32_t from, uint32_t (&r)[N], bool transposed) {
    const int base = warp() * WARP;
    block_.in_[thread_][0] = from;
    block_.in_[thread_][1] = transposed;
    block_.gather_warp(thread_, transposed ? (N == 4 ? "ldmatrix.x4.trans" : "ldmatrix.x2.trans") : (N == 4 ? "ldmatrix.x4" : "ldmatrix.x2"), [&, base] {
        for (int matrix = 0; matrix < N; ++matrix) {
            uint16_t cells[8][8];
            int banks = 0;
            for (int row = 0; row < 8; ++row) {
                const int lane = base + 8 * matrix + row;
                const uint32_t address = uint32_t(block_.in_[lane][0]);
                require(address % 16 == 0, "ldmatrix: unaligned row");
                banks |= 1 << address / 16 % 8;
                for (int i = 0; i < 4; ++i) {
                    const uint32_t bits = block_.shared_.read(address + 4 * i, lane);
                    cells[row][2 * i] = uint16_t(bits), cells[row][2 * i + 1] = uint16_t(bits >> 16);
                }
            }
            require(banks == 0xff, "ldmatrix: rows meet in a bank");
            for (int t = 0; t < WARP; ++t) {
                const int i = t / 4, j = t % 4 * 2;
                const uint32_t low = transposed ? cells[j][i] : cells[i][j], high = transposed ? cells[j + 1][i] : cells[i][j + 1];
                block_.out_[base + t][matrix] = low | high << 16;
            }
        }
    });
    for (int i = 0; i < N; ++i) r[i] = uint32_t(block_.out_[thread_][i]);
}

// mma.m16n8k16.row.col: with g = lane / 4 and j = lane % 4, a0, a1 hold columns 2 j, 2 j + 1 of rows g, g + 8, a2, a3 those columns + 8; b0, b1
// rows 2 j, 2 j + 1 and those + 8 of column g; d0, d1 columns 2 j, 2 j + 1 of row g, d2, d3 of row g + 8.
inline void Machine::products(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const numbers::Format& format) {
    const int base = warp() * WARP;
    for (int i = 0; i < 4; ++i) block_.in_[thread_][i] = a[i] | uint64_t(as_bits(d[i])) << 32;
    for (int i = 0; i < 2; ++i) block_.in_[thread_][4 + i] = b[i];
    block_.gather_warp(thread_, "mma", [&, base] {
        double left[16][16], right[16][8];
        const double* numbers = numbers::decoded(format);
        const auto half = [&](uint64_t bits, int i) { return numbers[uint32_t(bits) >> 16 * i & 0xffff]; };
        for (int t = 0; t < WARP; ++t) {
            const int g = t / 4, j = t % 4 * 2;
            const uint64_t* in = block_.in_[base + t];
            for (int i = 0; i < 4; ++i)
                for (int n = 0; n < 2; ++n) left[g + i % 2 * 8][j + i / 2 * 8 + n] = half(in[i], n);
            for (int i = 0; i < 2; ++i)
                for (int n = 0; n < 2; ++n) right[j + i * 8 + n][g] = half(in[4 + i], n);
        }
        for (int t = 0; t < WARP; ++t) {
            for (int i = 0; i < 4; ++i) {
                const int row = t / 4 + i / 2 * 8, column = t % 4 * 2 + i % 2;
                double sum = as_float(uint32_t(block_.in_[base + t][i] >> 32));
                for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                block_.out_[base + t][i] = as_bits(float(sum));
            }
        }
    });
    for (int i = 0; i < 4; ++i) d[i] = as_float(uint32_t(block_.out_[thread_][i]));
}

}  // namespace emulation
