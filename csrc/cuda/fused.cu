// Both orientations of a matrix from one read, for the pairs that recipes have: the same rule twice
// in 1x16 blocks, or four_over_six on rows and rtn on columns. Every other pair takes two kernels.
#include "quantize.h"

namespace nvfp4::cuda {
namespace {

template <template <class> class Rows, template <class> class Columns>
Variant pair(bool wide) {
    return variant_of<Scaled<Rows, false>, Scaled<Columns, false>>(wide);
}

bool simple(const Operand& operand) { return !operand.tiles && operand.metric == 0; }

}  // namespace

Variant fused_variant(const Operand& rows, const Operand& columns, bool wide) {
    if (!simple(rows) || !simple(columns)) return {};
    if (rows.rule == Rule::four_over_six && columns.rule == Rule::rtn)
        return pair<Squares, Nearest>(wide);
    if (rows.rule != columns.rule || rows.search != columns.search) return {};
    switch (rows.rule) {
        case Rule::rtn: return pair<Nearest, Nearest>(wide);
        case Rule::sr: return pair<Up, Up>(wide);
        case Rule::sr_te: return pair<Clipped, Clipped>(wide);
        case Rule::ms_eden: return eden_pair_variant(rows.search, wide);
        default: return {};
    }
}

}  // namespace nvfp4::cuda
