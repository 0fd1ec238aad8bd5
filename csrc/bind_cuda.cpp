// Python bindings of the CUDA kernels: raw addresses in, checks of what would corrupt memory, no
// arithmetic.
//
// Addresses are of device memory; a call names the device and the stream and returns once kernels
// are launched. Built without CUDA, over simt.h, the same module runs the same kernels on the
// processor (tests only).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_common.h"
#include "cuda/kernels.h"
#include "interface.h"
#if defined(NVFP4_SIMT)
#include "cuda/simt.h"
#endif

#if !defined(NVFP4_MODULE)
#define NVFP4_MODULE _cuda
#endif

namespace py = pybind11;
using namespace nvfp4;

namespace {

bool divides(uintptr_t unit, uintptr_t address, int64_t stride_bytes) {
    return address % unit == 0 && stride_bytes % static_cast<int64_t>(unit) == 0;
}

cuda::Matrix matrix_of(uintptr_t data, int element, int64_t rows, int64_t columns,
                       int64_t row_stride) {
    require(rows > 0 && columns > 0 && data != 0, "the source must not be empty");
    cuda::Matrix m{};
    m.data = reinterpret_cast<const void*>(data);
    m.element = element_of(element);
    m.rows = rows;
    m.columns = columns;
    m.row_stride = row_stride;
    m.aligned = divides(16, data, row_stride * (m.element == Element::float32 ? 4 : 2));
    return m;
}

cuda::Matrix coded_matrix(const CodeMatrix& coded, int64_t columns) {
    require_columns(coded, columns);
    require(coded.global_scale, "the source needs its global scale");
    cuda::Matrix m{};
    m.element = Element::codes;
    m.rows = coded.rows;
    m.columns = columns;
    m.coded = coded;
    m.aligned = divides(4, reinterpret_cast<uintptr_t>(coded.codes), coded.row_bytes);
    return m;
}

using CudaOptions = Options<cuda::Seed>;

cuda::Operand operand_of(const CudaOptions& options, int64_t lines, int64_t padded, uintptr_t codes,
                         uintptr_t block_scale, uintptr_t global_scale, uintptr_t peak,
                         bool knows_peak, uintptr_t lengths, uintptr_t swizzled, bool tensor_core) {
    require(!options.method.tiles || options.group <= kBlock,
            "16x16 blocks are not rotated in groups beyond 16");
    require(lines > 0 && padded > 0 && padded == options.padded(padded),
            "padded does not fit the rotation");
    require(codes && block_scale && global_scale && peak, "missing output");
    require(codes % 8 == 0, "codes must be aligned to 8 bytes");
    require(!options.is_eden() || (lengths && options.group),
            "ms_eden needs scratch and a rotation");
    require(!options.is_eden() || !knows_peak, "ms_eden finds its range itself");

    cuda::Operand operand{};
    static_cast<Method&>(operand) = options.method;
    operand.knows_peak = knows_peak;
    operand.fixed = options.fixed;
    operand.group = options.group;
    operand.rounds = options.rounds;
    operand.tensor_core = tensor_core;
    operand.seed = options.seed;
    operand.sign_seed = options.sign_seed;
    operand.padded = padded;
    operand.codes = reinterpret_cast<uint8_t*>(codes);
    operand.block_scale = reinterpret_cast<uint8_t*>(block_scale);
    operand.global_scale = reinterpret_cast<float*>(global_scale);
    operand.peak = reinterpret_cast<uint32_t*>(peak);
    operand.lengths = reinterpret_cast<float*>(lengths);
    operand.swizzled = reinterpret_cast<uint8_t*>(swizzled);
    operand.lines = lines;
    return operand;
}

void require_fit(const cuda::Matrix& m, const cuda::Operand& operand, bool down) {
    const int64_t lines = down ? m.columns : m.rows;
    const int64_t length = down ? m.rows : m.columns;
    require(operand.lines == lines && operand.padded == padded_length(length, operand.group),
            "the operand does not fit the matrix");
    require(down || m.element != Element::codes, "codes are quantised again as their transpose");
}

void quantize(const cuda::Matrix& m, const cuda::Operand& operand, bool down, int device,
              uintptr_t stream) {
    require_fit(m, operand, down);
    py::gil_scoped_release release;
    cuda::quantize(m, operand, down, device, reinterpret_cast<void*>(stream));
}

void quantize_both(const cuda::Matrix& m, const cuda::Operand& rows, const cuda::Operand& columns,
                   int device, uintptr_t stream) {
    require_fit(m, rows, false);
    require_fit(m, columns, true);
    py::gil_scoped_release release;
    cuda::quantize_both(m, rows, columns, device, reinterpret_cast<void*>(stream));
}

void decode(const CodeMatrix& matrix, int64_t columns, int element, uintptr_t out, int device,
            uintptr_t stream) {
    require_columns(matrix, columns);
    require(out != 0, "missing output");
    const Element checked = element_of(element);
    py::gil_scoped_release release;
    cuda::decode_matrix(matrix, columns, checked, reinterpret_cast<void*>(out), device,
                        reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(NVFP4_MODULE, m) {
    m.doc() = "CUDA kernels of nvfp4; see nvfp4/backends/native/cuda.py.";
    m.attr("interface") = kInterface;
    // local, because nvfp4._cpu has types of the same names
    py::class_<cuda::Matrix>(m, "Matrix", py::module_local())
        .def(py::init(&matrix_of))
        .def(py::init(&coded_matrix));
    py::class_<CodeMatrix>(m, "CodeMatrix", py::module_local()).def(py::init(&code_matrix));
    py::class_<cuda::Seed>(m, "Seed", py::module_local())
        .def(py::init([](uint64_t value, uintptr_t at) {
            return cuda::Seed{reinterpret_cast<const uint64_t*>(at), value};
        }));
    py::class_<Trials>(m, "Trials", py::module_local()).def(py::init(&trials_of));
    py::class_<CudaOptions>(m, "Options", py::module_local())
        .def(py::init(&checked_options<cuda::Seed>));
    py::class_<cuda::Operand>(m, "Operand", py::module_local()).def(py::init(&operand_of));
    m.def("quantize", &quantize);
    m.def("quantize_both", &quantize_both);
    m.def("fused", &cuda::fused);
    m.def("decode", &decode);
    m.def("architectures", [] {
        const int* list = nullptr;
        const int count = cuda::architectures(&list);
        py::list found;
        for (int i = 0; i < count; ++i) found.append(list[i]);
        return found;
    });
#if defined(NVFP4_SIMT)
    m.def("set_order", &nvfp4::simt::set_order);
    m.def("set_tensor_core", &nvfp4::simt::set_tensor_core);
#endif
}
