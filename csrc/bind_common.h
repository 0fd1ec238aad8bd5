// What both modules take from Python, and its checks.
//
// Python passes raw addresses and sizes. A wrong one would corrupt memory instead of raising, so
// everything that a kernel takes for granted is asked here or in the bindings, once per call:
//
//     Options(rule, metric, ...)                 how to quantise; bind.cpp and bind_cuda.cpp differ
//                                                in what a seed is: a number, or an address as well
//     CodeMatrix(codes, block_scale, ...)        a quantised matrix
//     element: 0 (float32), 1 (bfloat16), 2 (float16)
//
// A refusal is std::invalid_argument, which pybind11 makes a ValueError of.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "formats.h"
#include "operands.h"

namespace nvfp4 {

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

inline Element element_of(int element) {
    require(element >= 0 && element <= 2,
            "element must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    return static_cast<Element>(element);
}

inline CodeMatrix code_matrix(uintptr_t codes, uintptr_t block_scale, uintptr_t global_scale,
                              int64_t rows, int64_t row_bytes, int64_t scale_stride,
                              int64_t scale_block_rows, bool row_scaled) {
    require(rows > 0 && row_bytes > 0 && codes && block_scale, "the codes must not be empty");
    require(scale_block_rows == 1 || scale_block_rows == kBlock,
            "scale_block_rows must be 1 or 16");
    return {reinterpret_cast<const uint8_t*>(codes),
            reinterpret_cast<const uint8_t*>(block_scale),
            reinterpret_cast<const float*>(global_scale),
            rows,
            row_bytes,
            scale_stride,
            scale_block_rows,
            row_scaled};
}

// The last block of a row may hold codes of padding.
inline void require_columns(const CodeMatrix& matrix, int64_t columns) {
    require(columns > 0 && columns <= matrix.row_bytes * 2, "more columns than there are codes");
}

// Kp: the contraction as the operand has it, whole blocks and whole groups of the rotation.
inline int64_t padded_length(int64_t length, int group) {
    const int64_t unit = group ? group : kBlock;
    return ceil_div(length, unit) * unit;
}

// A method with its rotation and its seeds.
template <class Seed>
struct Options {
    Method method{};
    int group = 0;  // elements rotated together; 0: no rotation
    int rounds = 1;
    bool fixed = false;  // NVIDIA's rotation
    Seed seed{}, sign_seed{};

    int64_t padded(int64_t length) const { return padded_length(length, group); }
    bool is_eden() const { return method.rule == Rule::ms_eden; }
};

// Steps of scale_search, or c and fl(1 / c) of ms_eden; none for rules that try nothing.
inline Trials trials_of(const std::vector<float>& value, const std::vector<float>& inverse) {
    require(value.size() == inverse.size() && value.size() <= static_cast<size_t>(Trials::most),
            "a search tries at most 16 scales");
    Trials trials{static_cast<int>(value.size()), {}, {}};
    std::copy(value.begin(), value.end(), trials.value);
    std::copy(inverse.begin(), inverse.end(), trials.inverse);
    return trials;
}

template <class Seed>
Options<Seed> checked_options(int rule, int metric, bool tiles, bool row_scaled, bool search,
                              const Trials& trials, int group, int rounds, bool fixed, Seed seed,
                              Seed sign_seed) {
    require(rule >= 0 && rule <= 5 && metric >= 0 && metric <= 2, "unknown rule or metric");
    const Method method{static_cast<Rule>(rule), metric, tiles, row_scaled, search, trials};
    const Options<Seed> options{method, group, rounds, fixed, seed, sign_seed};
    const bool searches = method.rule == Rule::scale_search || (options.is_eden() && search);
    require(!searches || method.trials.count > 0, "a search has to try something");

    require(group == 0 || group == 16 || group == 32 || group == 64 || group == 128,
            "group must be 0, 16, 32, 64 or 128");
    require(rounds >= 1 && rounds <= 3, "rounds must be 1, 2 or 3");
    require(!fixed || (group <= 16 && rounds == 1), "a fixed rotation has group 16 and one round");
    require(!tiles || !row_scaled, "16x16 blocks have one scale for the tensor");
    require(!options.is_eden() || (!tiles && !row_scaled),
            "ms_eden has 1x16 blocks and one scale for the tensor");
    return options;
}

}  // namespace nvfp4
