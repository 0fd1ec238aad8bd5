// Runs every kernel of one instruction set over hard inputs and prints a digest of the bytes of
// each case, one per line:
//
//     native_digests [portable | avx2 | avx512]
//
// Two processors, or two instruction sets of one, agree to the last bit where their lines do. No
// Python and no torch, so that it can be cross-compiled and emulated;
// tests/backends/test_aarch64.py does that and compares the lines with this machine's.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using namespace nvfp4;

namespace {

struct Random {
    uint64_t state;
    uint32_t word() {  // the high half of Knuth's linear congruential generator
        state = state * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state >> 32);
    }
    float uniform() { return static_cast<float>(word() >> 8) * 0x1p-24f; }
};

float from_bits(uint32_t b) {
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, sizeof b);
    return b;
}

const char* const kKinds[] = {"bell", "wide", "ties", "sparse", "zeros",
                              "tiny", "huge", "nan",  "inf"};

// One element of a matrix of that difficulty; integer arithmetic and exact scalings, so that it is
// the same everywhere.
float element(int kind, Random& random, bool first) {
    float bell = -2.0f;
    for (int i = 0; i < 4; ++i) bell += random.uniform();
    switch (kind) {
        case 1: return bell * from_bits((67 + random.word() % 120) << 23);
        case 2: return (static_cast<float>(random.word() % 49) - 24.0f) / 4.0f;
        case 3: return random.word() % 10 ? 0.0f : bell;
        case 4: return random.word() % 2 ? 0.0f : -0.0f;
        case 5: return from_bits(random.word() % 1000 | (random.word() & 0x80000000u));
        case 6: return bell * 0x1p126f;
        case 7: return first ? from_bits(0x7fc00000u) : bell;
        case 8: return first ? from_bits(0xff800000u) : bell;
        default: return bell;
    }
}

// The bytes of x in a format: BF16 cut off, float16 as any bits at all but Inf and NaN.
void put(std::vector<uint8_t>& to, size_t at, Element format, float x, Random& random) {
    const uint32_t word = bits(x);
    const uint16_t half =
        static_cast<uint16_t>(format == Element::bfloat16 ? word >> 16 : random.word() & 0xbbffu);
    if (format == Element::float32)
        memcpy(&to[at * 4], &word, 4);
    else
        memcpy(&to[at * 2], &half, 2);
}

uint64_t digest(uint64_t hash, const void* data, size_t count) {  // FNV-1a
    for (size_t i = 0; i < count; ++i)
        hash = (hash ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
    return hash;
}

// NaN has many bit patterns, and processors differ in which they produce.
uint64_t digest_floats(uint64_t hash, const std::vector<float>& values) {
    for (const float x : values) {
        const uint32_t b = x == x ? bits(x) : 0x7fc00000u;
        hash = digest(hash, &b, sizeof b);
    }
    return hash;
}

uint64_t digest_halves(uint64_t hash, const std::vector<uint16_t>& values, uint16_t infinity) {
    for (const uint16_t h : values) {
        const uint16_t b = (h & 0x7fff) > infinity ? 0x7fff : h;
        hash = digest(hash, &b, sizeof b);
    }
    return hash;
}

struct Result {
    std::vector<uint8_t> codes, scales;
    std::vector<float> global, scratch;

    Result(int64_t rows, int64_t padded)
        : codes(static_cast<size_t>(rows * padded / 2)),
          scales(static_cast<size_t>(rows * padded / 16)),
          global(static_cast<size_t>(rows)),
          scratch(static_cast<size_t>(rows * padded / 16)) {}

    uint64_t hash() const {
        uint64_t h = digest(0xcbf29ce484222325u, codes.data(), codes.size());
        return digest_floats(digest(h, scales.data(), scales.size()), global);
    }
    void into(QuantizeArgs& args) {
        args.codes = codes.data();
        args.block_scale = scales.data();
        args.global_scale = global.data();
        args.scratch = scratch.data();
    }
};

struct Case {
    const char* name;
    Rule rule;
    int metric;
    bool tiles, row_scaled, search;
    RotationSpec rotation;
    std::vector<float> trials = {};  // steps of a scale, or factors
};

Trials trials_of(const Case& c) {
    Trials trials{static_cast<int>(c.trials.size()), {}, {}};
    for (size_t i = 0; i < c.trials.size(); ++i) {
        const float scale = 0x1.849d64p+2f / c.trials[i];
        trials.value[i] = c.rule == Rule::ms_eden ? scale : c.trials[i];
        trials.inverse[i] = 1.0f / scale;
    }
    return trials;
}

const Case kCases[] = {
    {"rtn", Rule::rtn, 0, false, false, false, {}},
    {"rtn rows", Rule::rtn, 0, false, true, false, {}},
    {"rtn fixed", Rule::rtn, 0, false, false, false, {16, 1, 0, true}},
    {"rtn tiles", Rule::rtn, 0, true, false, false, {128, 3, 5, false}},
    {"sr", Rule::sr, 0, false, false, false, {}},
    {"sr rows", Rule::sr, 0, false, true, false, {64, 2, 77, false}},
    {"sr tiles", Rule::sr, 0, true, false, false, {}},
    {"sr_te", Rule::sr_te, 0, false, false, false, {16, 1, 77, false}},
    {"four_over_six mse", Rule::four_over_six, 0, false, false, false, {}},
    {"four_over_six mae", Rule::four_over_six, 1, false, true, false, {}},
    {"four_over_six abs_max", Rule::four_over_six, 2, false, false, false, {}},
    {"four_over_six mse tiles", Rule::four_over_six, 0, true, false, false, {}},
    {"four_over_six mae tiles", Rule::four_over_six, 1, true, false, false, {}},
    {"four_over_six abs_max tiles", Rule::four_over_six, 2, true, false, false, {}},
    {"scale_search", Rule::scale_search, 0, false, false, false, {}, {0, -2, -1, 1, 2, 3, 4, 5, 6}},
    {"scale_search tiles",
     Rule::scale_search,
     0,
     true,
     false,
     false,
     {32, 1, 3, false},
     {5, 0, -8}},
    {"ms_eden 1", Rule::ms_eden, 0, false, false, false, {128, 1, 4, false}},
    {"ms_eden 3 of 32", Rule::ms_eden, 0, false, false, false, {32, 3, 4, false}},
    {"ms_eden 2 search",
     Rule::ms_eden,
     0,
     false,
     false,
     true,
     {128, 2, 4, false},
     {1.0f, 0.875f, 1.125f, 1.25f, 1.375f, 1.5f}},
};

struct Shape {
    int64_t rows, columns;
};
const Shape kShapes[] = {{1, 1}, {17, 33}, {5, 300}, {130, 128}, {300, 5}, {33, 129}, {64, 256}};

int64_t padded(int64_t columns, const Case& c) {
    const int64_t unit = c.rotation.group ? c.rotation.group : 16;
    return (columns + unit - 1) / unit * unit;
}

QuantizeArgs args_of(const Case& c, const Source& source, uint64_t seed, Result& result) {
    QuantizeArgs args{};
    args.source = source;
    args.rotation = c.rotation;
    args.rule = c.rule;
    args.metric = c.metric;
    args.tiles = c.tiles;
    args.row_scaled = c.row_scaled;
    args.search = c.search;
    args.trials = trials_of(c);
    args.seed = seed;
    args.padded_columns = padded(source.columns, c);
    args.threads = 1;
    result.into(args);
    return args;
}

Source view(const std::vector<uint8_t>& x, Element format, Shape shape, bool transposed) {
    Source source{};
    source.data = x.data();
    source.element = format;
    source.rows = transposed ? shape.columns : shape.rows;
    source.columns = transposed ? shape.rows : shape.columns;
    source.row_stride = transposed ? 1 : shape.columns;
    source.column_stride = transposed ? shape.columns : 1;
    return source;
}

uint64_t decoded(const Kernels& kernels, const CodeMatrix& matrix, int64_t columns) {
    uint64_t hash = 0;
    const size_t count = static_cast<size_t>(matrix.rows * columns);
    std::vector<float> whole(count);
    std::vector<uint16_t> half(count);
    kernels.decode({matrix, columns, Element::float32, whole.data(), 1});
    hash = digest_floats(hash, whole);
    kernels.decode({matrix, columns, Element::bfloat16, half.data(), 1});
    hash = digest_halves(hash, half, 0x7f80);
    kernels.decode({matrix, columns, Element::float16, half.data(), 1});
    hash = digest_halves(hash, half, 0x7c00);
    CodeMatrix exact = matrix;  // without its global scale BF16 is a look-up
    exact.global_scale = nullptr;
    kernels.decode({exact, columns, Element::bfloat16, half.data(), 1});
    return digest_halves(hash, half, 0x7f80);
}

// x, x^T, both at once, the codes decoded, and the transpose quantised anew from codes.
void run(const Kernels& kernels, const Case& c, Shape shape, int kind, Element format,
         uint64_t seed) {
    Random random{seed};
    std::vector<uint8_t> x(static_cast<size_t>(shape.rows * shape.columns) * 4);
    for (int64_t i = 0; i < shape.rows * shape.columns; ++i)
        put(x, static_cast<size_t>(i), format,
            element(kind, random, i == shape.rows * shape.columns / 2), random);
    const Source across = view(x, format, shape, false), down = view(x, format, shape, true);
    const int64_t wide = padded(across.columns, c), tall = padded(down.columns, c);
    Result row(across.rows, wide), column(down.rows, tall), row_again(across.rows, wide),
        column_again(down.rows, tall);
    kernels.quantize(args_of(c, across, seed, row));
    kernels.quantize(args_of(c, down, seed, column));
    kernels.quantize_both(args_of(c, across, seed, row_again),
                          args_of(c, down, seed, column_again));
    const int64_t block_rows = c.tiles ? 16 : 1;
    const CodeMatrix matrix{row.codes.data(), row.scales.data(), row.global.data(), across.rows,
                            wide / 2,         wide / 16,         block_rows,        c.row_scaled};
    printf("%s %s format %d, %dx%d:", c.name, kKinds[kind], static_cast<int>(format),
           static_cast<int>(shape.rows), static_cast<int>(shape.columns));
    for (const Result* result : {&row, &column, &row_again, &column_again})
        printf(" %016llx", static_cast<unsigned long long>(result->hash()));
    Source saved{};
    saved.element = Element::codes;
    saved.rows = across.columns;
    saved.columns = across.rows;
    saved.decoded = matrix;
    Result anew(saved.rows, padded(saved.columns, c));
    kernels.quantize(args_of(c, saved, seed, anew));
    printf(" %016llx %016llx\n", static_cast<unsigned long long>(anew.hash()),
           static_cast<unsigned long long>(decoded(kernels, matrix, across.columns)));
}

const Kernels* kernels_of(const std::string& name) {
#if defined(__x86_64__) && !defined(NVFP4_PORTABLE_ALONE)
    if (name == "avx512") return &avx512_kernels;
    if (name == "avx2") return &avx2_kernels;
#endif
    return name == "portable" ? &portable_kernels : nullptr;
}

}  // namespace

int main(int count, char** arguments) {
    const Kernels* kernels = kernels_of(count > 1 ? arguments[1] : "portable");
    if (!kernels) {
        fprintf(stderr, "native_digests: expected portable, avx2 or avx512, got %s\n",
                arguments[1]);
        return 2;
    }
    uint64_t seed = 1;
    for (const Case& c : kCases)
        for (const Shape shape : kShapes)
            for (int kind = 0; kind < 9; ++kind, ++seed)
                // emulation is slow; every case, shape and kind comes up in some company
                if (seed % 4 == 0)
                    run(*kernels, c, shape, kind, static_cast<Element>(seed / 4 % 3),
                        seed * 0x9E3779B97F4A7C15u);
    for (const int64_t bytes : {1, 511, 4096, 65537, 300000}) {
        Random random{static_cast<uint64_t>(bytes)};
        std::vector<uint8_t> data(static_cast<size_t>(bytes));
        for (uint8_t& byte : data) byte = static_cast<uint8_t>(random.word() >> 24);
        printf("fingerprint %d: %016llx\n", static_cast<int>(bytes),
               static_cast<unsigned long long>(kernels->fingerprint(data.data(), bytes, 1)));
    }
    return 0;
}
