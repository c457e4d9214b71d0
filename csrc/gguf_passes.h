// Rows of x as products with blocks of GGUF read them: integers of 8 bits with a scale for every 32 inputs.
//
// Where a group of a row stands out from the row, its rounding would be felt in all outputs: it gets a second digit, which
// says what the first left, and is multiplied twice. A weight may ask for both digits of every group: inputs of 15 bits,
// which are multiplied at once as integers of 16 bits. A pass is one digit of one group of inputs, of all rows of a tile,
// or both.
#pragma once

#include "area.h"
#include "byte_products.h"
#include "kernels.h"
#include "row_groups.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kPassInputs = 32, kPassSteps = kPassInputs / 4;
// A group stands out if its largest magnitude is more than so many times the root mean square of its row.
constexpr float kStandsOut = 4.0f;
// What a digit leaves is at most half of its unit: 127 of the next one's.
constexpr int32_t kSecondUnits = 254;
constexpr float kSecondDigit = 1.0f / kSecondUnits;

// One row's part of a pass.
struct RowPass {
    float scale;
    int32_t sums[2];  // of each 16 of its integers
    int32_t sum;
};

// Rows of x in passes. A tile of rows has the room of its rows, in which [pass][row of the tile] follow each other.
struct BlockRows {
    int32_t* words;     // [pass][kPassSteps][row]: four inputs; both digits: [pass][2][kPassSteps][row], inputs 0 and 2
                        // of a step, then 1 and 3
    RowPass* of_rows;   // [pass][row]
    int32_t* groups;    // [pass]: its group of inputs
    int32_t* num_passes;
    int64_t num_groups;

    // Every group may need both digits.
    BlockRows(int64_t rows, int64_t k, Area& area) : num_groups(k / kPassInputs) {
        words = area.take<int32_t>(rows * 2 * num_groups * kPassSteps);
        of_rows = area.take<RowPass>(rows * 2 * num_groups);
        groups = area.take<int32_t>(rows * 2 * num_groups);
        num_passes = area.take<int32_t>(rows);
    }
    BlockRows(const BlockRows& from, int64_t row) : BlockRows(from) {
        words += row * 2 * num_groups * kPassSteps;
        of_rows += row * 2 * num_groups;
        groups += row * 2 * num_groups;
        num_passes += row;
    }
};

// The digits of the rows of one tile, as they are made.
struct Digits {
    struct Group {
        RowPass first, second;
        bool stands_out;
    };
    int8_t *first, *second;  // [row][k]
    Group* groups;           // [row][group]

    Digits(int64_t k, Area& area)
        : first(area.take<int8_t>(kRowsOfBytes * k)),
          second(area.take<int8_t>(kRowsOfBytes * k)),
          groups(area.take<Group>(kRowsOfBytes * (k / kPassInputs))) {}
};

QUIRE_INLINE void put_bytes(int8_t* to, IntVec integers) {
    typedef int8_t Bytes __attribute__((vector_size(kLanes)));
    const Bytes bytes = __builtin_convertvector(integers, Bytes);
    memcpy(to, &bytes, sizeof bytes);
}

// One digit of `numbers`, which are made smaller by what it says.
QUIRE_INLINE RowPass take_digit(Vec* numbers, float scale, int8_t* to) {
    constexpr int kVectors = kPassInputs / kLanes;
    RowPass pass{scale, {0, 0}, 0};
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
        const IntVec integers = nearest(numbers[i]);
        numbers[i] -= __builtin_convertvector(integers, Vec);
        put_bytes(to + i * kLanes, integers);
        int32_t sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum += integers[lane];
        pass.sums[i * kLanes / 16] += sum;
    }
    pass.sum = pass.sums[0] + pass.sums[1];
    return pass;
}

// A group with an infinity or a NaN gets a NaN for its scale, and so the row for its results.
static void make_digits(const float* x, int64_t k, bool both, int8_t* first, int8_t* second, Digits::Group* groups) {
    constexpr int kVectors = kPassInputs / kLanes;
    Vec squares{};
    for (int64_t i = 0; i < k; i += kLanes) squares += load(x + i) * load(x + i);
    const float usual = kStandsOut * sqrtf(sum(squares) / float(k));
    for (int64_t g = 0; g < k / kPassInputs; ++g, x += kPassInputs, first += kPassInputs, second += kPassInputs) {
        // Compared as integers, magnitudes keep their order, and NaN is larger than all.
        IntVec magnitudes{};
        for (int i = 0; i < kVectors; ++i) {
            const IntVec bits = (IntVec)load(x + i * kLanes) & 0x7fffffff;
            magnitudes = bits > magnitudes ? bits : magnitudes;
        }
        int32_t largest = 0;
        for (int i = 0; i < kLanes; ++i) largest = magnitudes[i] > largest ? magnitudes[i] : largest;
        const bool finite = largest < 0x7f800000;
        const float magnitude = as_float(uint32_t(largest));
        const float inverse = finite && magnitude >= kSmallestMagnitude ? 127.0f / magnitude : 0.0f;
        const float scale = finite ? magnitude / 127.0f : as_float(0x7fc00000);
        Vec numbers[kVectors];
        for (int i = 0; i < kVectors; ++i) numbers[i] = finite ? load(x + i * kLanes) * inverse : Vec{};
        Digits::Group& group = groups[g];
        group.first = take_digit(numbers, scale, first);
        group.stands_out = both || magnitude > usual;
        if (group.stands_out) {
            for (int i = 0; i < kVectors; ++i) numbers[i] *= 254.0f;
            group.second = take_digit(numbers, scale * kSecondDigit, second);
        } else {
            group.second = {};
            memset(second, 0, kPassInputs);
        }
    }
}

// A pass with both digits of every row.
static void join_digits(int64_t rows, int64_t k, const Digits& digits, int64_t g, const BlockRows& to) {
    for (int64_t r = 0; r < rows; ++r) {
        const int8_t *const first = digits.first + r * k + g * kPassInputs, *const second = digits.second + r * k + g * kPassInputs;
        int32_t* const words = to.words + g * 2 * kPassSteps * rows + r;
        const auto both = [&](int64_t i) { return kSecondUnits * first[i] + second[i]; };
        for (int64_t step = 0; step < kPassSteps; ++step)
            for (int64_t part = 0; part < 2; ++part)
                words[(part * kPassSteps + step) * rows] =
                    int32_t(uint32_t(both(4 * step + part + 2)) << 16 | (uint32_t(both(4 * step + part)) & 0xffff));
        const Digits::Group& of = digits.groups[r * to.num_groups + g];
        const auto sum = [&](int half) { return kSecondUnits * of.first.sums[half] + of.second.sums[half]; };
        to.of_rows[g * rows + r] = {of.second.scale, {sum(0), sum(1)}, sum(0) + sum(1)};
    }
    to.groups[g] = int32_t(g);
}

// The passes of a tile, made of the digits of its rows. `row(r)` is where row r lies.
template <class Row>
static void make_passes(int64_t rows, int64_t k, bool both, const Digits& digits, const BlockRows& to, const Row& row) {
    for (int64_t r = 0; r < rows; ++r)
        make_digits(row(r), k, both, digits.first + r * k, digits.second + r * k, digits.groups + r * to.num_groups);
    int32_t num = 0;
    for (int64_t g = 0; g < to.num_groups; ++g) {
        if (both) {
            join_digits(rows, k, digits, num++, to);
            continue;
        }
        const auto add = [&](const int8_t* bytes, auto pass_of) {
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t step = 0; step < kPassSteps; ++step)
                    memcpy(to.words + (num * kPassSteps + step) * rows + r, bytes + r * k + g * kPassInputs + 4 * step, 4);
                to.of_rows[num * rows + r] = pass_of(digits.groups[r * to.num_groups + g]);
            }
            to.groups[num++] = int32_t(g);
        };
        add(digits.first, [](const Digits::Group& group) { return group.first; });
        bool stands_out = false;
        for (int64_t r = 0; r < rows; ++r) stands_out |= digits.groups[r * to.num_groups + g].stands_out;
        if (stands_out) add(digits.second, [](const Digits::Group& group) { return group.second; });
    }
    *to.num_passes = num;
}

}  // namespace quire::QUIRE_ISA
