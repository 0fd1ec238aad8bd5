// Python bindings of the native CPU kernels: raw addresses in, checks of what would corrupt memory,
// no arithmetic.
//
// A call names an instruction set, or "" for the best that the processor has and the process may
// use. Two lists decide: available() for what quantises and decodes, products() for what
// multiplies. ``use`` holds a process to what a lesser processor would have. The interpreter's lock
// is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "bind_common.h"
#include "cpu/kernels.h"
#include "cpu/transpose_codes.h"
#include "interface.h"
#include "layout.h"
#include "philox.h"

namespace py = pybind11;
using namespace nvfp4;

namespace {

// What this processor has, the widest first.
const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> found;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            found.push_back(&avx512_kernels);
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            found.push_back(&avx2_kernels);
#endif
        found.push_back(&portable_kernels);
        return found;
    }();
    return all;
}

// Where in available() the process may begin: it behaves as if the processor had nothing before
// that.
std::atomic<size_t> held{0};

// The instruction set of that name, the best one for "", among those that come after the first
// ``from``.
size_t find(const std::string& isa, size_t from) {
    const std::vector<const Kernels*>& all = available();
    for (size_t i = from; i < all.size(); ++i)
        if (isa.empty() || isa == all[i]->name) return i;
    throw std::invalid_argument(
        "instruction set '" + isa +
        "' is unknown, not supported by this processor, or better than the " + all[from]->name +
        " that this process is held to");
}

void use(const std::string& isa) { held = find(isa, 0); }

const Kernels& kernels(const std::string& isa) { return *available()[find(isa, held)]; }

Source source_of(uintptr_t data, int element, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t column_stride) {
    require(rows > 0 && columns > 0 && data != 0, "the source must not be empty");
    require(row_stride == 1 || column_stride == 1, "one stride must be 1");
    Source source{};
    source.data = reinterpret_cast<const void*>(data);
    source.element = element_of(element);
    source.rows = rows;
    source.columns = columns;
    source.row_stride = row_stride;
    source.column_stride = column_stride;
    // one row may have two unit strides; the contiguous way is then along it
    if (row_stride == 1 && column_stride == 1 && rows == 1) source.row_stride = columns;
    return source;
}

Source codes_source(const CodeMatrix& decoded, int64_t rows) {
    require(rows > 0 && rows <= decoded.row_bytes * 2,
            "more operand rows than the codes have columns");
    require(decoded.global_scale, "the source needs its global scale");
    Source source{};
    source.element = Element::codes;
    source.rows = rows;
    source.columns = decoded.rows;
    source.decoded = decoded;
    return source;
}

using CpuOptions = Options<uint64_t>;

QuantizeArgs quantize_args(const Source& source, const CpuOptions& options, int64_t padded_columns,
                           uintptr_t codes, uintptr_t block_scale, uintptr_t global_scale,
                           uintptr_t scratch, uintptr_t amax, int threads) {
    require(padded_columns == options.padded(source.columns),
            "padded_columns does not fit the source");
    require(codes && block_scale && global_scale && threads > 0, "missing output");
    require(!options.is_eden() || scratch, "ms_eden needs scratch");
    require(!amax || (!options.is_eden() && !options.group),
            "an amax of rotated values cannot be given");

    QuantizeArgs args{};
    static_cast<Method&>(args) = options.method;
    args.source = source;
    args.rotation = {options.group, options.rounds, options.sign_seed, options.fixed};
    args.seed = options.seed;
    args.padded_columns = padded_columns;
    args.codes = reinterpret_cast<uint8_t*>(codes);
    args.block_scale = reinterpret_cast<uint8_t*>(block_scale);
    args.global_scale = reinterpret_cast<float*>(global_scale);
    args.scratch = reinterpret_cast<float*>(scratch);
    args.amax = reinterpret_cast<const float*>(amax);
    args.threads = threads;
    return args;
}

void quantize(const QuantizeArgs& args, const std::string& isa) {
    const Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    k.quantize(args);
}

void require_transposes(const QuantizeArgs& across, const QuantizeArgs& down) {
    const Source &a = across.source, &b = down.source;
    require(a.element == b.element && a.element != Element::codes && a.data == b.data &&
                a.rows == b.columns && a.columns == b.rows &&
                (a.rows == 1 || a.row_stride == b.column_stride) &&
                (a.columns == 1 || a.column_stride == b.row_stride),
            "the two sources must be one matrix and its transpose");
}

void quantize_both(const QuantizeArgs& across, const QuantizeArgs& down, const std::string& isa) {
    require_transposes(across, down);
    const Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    k.quantize_both(across, down);
}

// Many matrices, which experts have: one after the other on all threads or, where they are more
// than the threads, several at a time on a thread each. No result depends on which.
template <class Work>
void for_many(size_t count, int threads, Work work) {
    const bool apart = threads > 1 && count >= 2 * static_cast<size_t>(threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (apart)
    for (size_t i = 0; i < count; ++i) work(i, apart ? 1 : threads);
}

// A matrix, or a matrix and its transpose.
struct ManyArgs {
    QuantizeArgs across;
    std::optional<QuantizeArgs> down;
};

void quantize_many(const std::vector<ManyArgs>& matrices, int threads, const std::string& isa) {
    for (const ManyArgs& matrix : matrices)
        if (matrix.down) require_transposes(matrix.across, *matrix.down);
    const Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    for_many(matrices.size(), threads, [&](size_t i, int own_threads) {
        ManyArgs own = matrices[i];
        own.across.threads = own_threads;
        if (!own.down) return k.quantize(own.across);
        own.down->threads = own_threads;
        k.quantize_both(own.across, *own.down);
    });
}

void decode(const CodeMatrix& matrix, int64_t columns, int element, uintptr_t out, int threads,
            const std::string& isa) {
    require_columns(matrix, columns);
    require(out && threads > 0, "missing output");
    const DecodeArgs args{matrix, columns, element_of(element), reinterpret_cast<void*>(out),
                          threads};
    const Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    k.decode(args);
}

// q: codes in 16x16 blocks. codes [columns, ceil(rows / 16) * 8], block_scale [Kp / 16, rows / 16].
void transpose(const CodeMatrix& q, int64_t columns, uintptr_t codes, uintptr_t block_scale,
               int threads) {
    require_columns(q, columns);
    require(q.scale_block_rows == kBlock && q.row_bytes % 8 == 0, "only tiles have a transpose");
    require(columns > q.row_bytes * 2 - kBlock, "a whole block of columns would be left out");
    require(codes && block_scale && threads > 0, "missing output");
    py::gil_scoped_release release;
    transpose_codes(q, columns, reinterpret_cast<uint8_t*>(codes),
                    reinterpret_cast<uint8_t*>(block_scale), threads);
}

struct Product {
    const char* name;
    void (*run)(const MatmulArgs&);
    bool of_elements;                      // as well as of codes
    void (*in_groups)(const MatmulArgs&);  // of codes, summed as tensor cores do; or null
};

// The products with instructions that this processor has and the process is not kept from, the
// fastest first.
std::vector<Product> products() {
    std::vector<Product> found;
#if defined(__x86_64__)
    const bool avx512 = kernels("").name == std::string("avx512");
    if (avx512 && __builtin_cpu_supports("avx512bf16"))
        found.push_back({"avx512bf16", matmul_avx512bf16, false, nullptr});
    if (avx512) found.push_back({"avx512", matmul_avx512, true, matmul_groups_avx512});
    const bool avx2 = avx512 || kernels("").name == std::string("avx2");  // with FMA
    if (avx2 && __builtin_cpu_supports("f16c"))
        found.push_back({"avx2", matmul_avx2, true, matmul_groups_avx2});
#endif
    return found;
}

using Run = void (*)(const MatmulArgs&);

Run product_for(bool of_elements, const std::string& isa, bool in_groups = false) {
    for (const Product& p : products()) {
        const Run run = in_groups ? p.in_groups : p.run;
        if ((isa.empty() || isa == p.name) && (p.of_elements || !of_elements) && run) return run;
    }
    throw std::invalid_argument("there is no product for instruction set '" + isa +
                                "' on this processor");
}

void multiply(const MatmulArgs& args, const std::string& isa, bool in_groups = false) {
    const Run run = product_for(args.a.codes.codes == nullptr, isa, in_groups);
    py::gil_scoped_release release;
    run(args);
}

MatmulArgs matmul_args(const CodeMatrix& a, const CodeMatrix& b, uintptr_t bias, int element,
                       uintptr_t out, int threads) {
    require(a.row_bytes == b.row_bytes && a.row_bytes % 8 == 0,
            "operands contract different lengths");
    require(a.global_scale && b.global_scale && out && threads > 0, "missing scale or output");
    return {{a, {}},
            {b, {}},
            a.rows,
            b.rows,
            a.row_bytes * 2,
            reinterpret_cast<const float*>(bias),
            element_of(element),
            reinterpret_cast<void*>(out),
            threads};
}

void matmul(const CodeMatrix& a, const CodeMatrix& b, uintptr_t bias, int element, uintptr_t out,
            int threads, const std::string& isa, bool in_groups) {
    multiply(matmul_args(a, b, bias, element, out, threads), isa, in_groups);
}

void matmul_many(const std::vector<MatmulArgs>& products, int threads, const std::string& isa) {
    const Run run = product_for(false, isa);
    py::gil_scoped_release release;
    for_many(products.size(), threads, [&](size_t i, int own_threads) {
        MatmulArgs own = products[i];
        own.threads = own_threads;
        run(own);
    });
}

// a [rows, depth], b [columns, depth], one stride of each being 1.
void dense_matmul(uintptr_t a, int a_element, int64_t a_row, int64_t a_column, uintptr_t b,
                  int b_element, int64_t b_row, int64_t b_column, int64_t rows, int64_t columns,
                  int64_t depth, uintptr_t bias, int element, uintptr_t out, int threads,
                  const std::string& isa) {
    require(out && threads > 0, "missing output");
    multiply({{{}, source_of(a, a_element, rows, depth, a_row, a_column)},
              {{}, source_of(b, b_element, columns, depth, b_row, b_column)},
              rows,
              columns,
              depth,
              reinterpret_cast<const float*>(bias),
              element_of(element),
              reinterpret_cast<void*>(out),
              threads},
             isa);
}

uint64_t fingerprint(uintptr_t data, int64_t bytes, int threads, const std::string& isa) {
    require(data && bytes > 0 && threads > 0, "there is nothing to read");
    const Kernels& k = kernels(isa);
    py::gil_scoped_release release;
    return k.fingerprint(reinterpret_cast<const void*>(data), bytes, threads);
}

uint64_t fold_in(uint64_t seed, const std::vector<uint64_t>& data) {
    for (const uint64_t datum : data) {
        uint32_t word[4];
        philox<uint32_t>(seed, static_cast<uint32_t>(datum), static_cast<uint32_t>(datum >> 32),
                         kFoldStream, word);
        seed = word[0] | static_cast<uint64_t>(word[1]) << 32;
    }
    return seed;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Native CPU kernels of nvfp4; see nvfp4/backends/native/cpu.py.";
    m.attr("interface") = kInterface;
    m.def("instruction_sets", [] {
        py::list names;
        for (size_t i = held; i < available().size(); ++i) names.append(available()[i]->name);
        return names;
    });
    m.def("use", &use);
    py::class_<CodeMatrix>(m, "CodeMatrix").def(py::init(&code_matrix));
    py::class_<Source>(m, "Source").def(py::init(&source_of)).def(py::init(&codes_source));
    py::class_<Trials>(m, "Trials").def(py::init(&trials_of));
    py::class_<CpuOptions>(m, "Options")
        .def(py::init([](int rule, int metric, bool tiles, bool row_scaled, bool search,
                         const Trials& trials, uint64_t seed, int group, int rounds,
                         uint64_t sign_seed, bool fixed) {
            return checked_options(rule, metric, tiles, row_scaled, search, trials, group, rounds,
                                   fixed, seed, sign_seed);
        }));
    py::class_<QuantizeArgs>(m, "QuantizeArgs").def(py::init(&quantize_args));
    m.def("quantize", &quantize);
    m.def("quantize_both", &quantize_both);
    py::class_<ManyArgs>(m, "ManyArgs")
        .def(py::init([](const QuantizeArgs& across) { return ManyArgs{across, {}}; }))
        .def(py::init([](const QuantizeArgs& across, const QuantizeArgs& down) {
            return ManyArgs{across, down};
        }));
    m.def("quantize_many", &quantize_many);
    m.def("decode", &decode);
    m.def("transpose", &transpose);
    m.def("fingerprint", &fingerprint);
    m.def("product_sets", [] {
        py::list names;
        for (const Product& p : products()) names.append(p.name);
        return names;
    });
    py::class_<MatmulArgs>(m, "MatmulArgs").def(py::init(&matmul_args));
    m.def("matmul", &matmul);
    m.def("matmul_many", &matmul_many);
    m.def("dense_matmul", &dense_matmul);
    m.def("fold_in", &fold_in);
    m.def("swizzled_offset", &swizzled_offset<int64_t>);
}
