// MS-EDEN, of one orientation or of both in one read, with and without search.
#include "quantize.h"

namespace nvfp4::cuda {

Variant eden_variant(const Operand& operand, bool down, bool wide) {
    if (operand.rule != Rule::ms_eden) return {};
    return operand.search ? variant_of<Eden<true>>(down, wide)
                          : variant_of<Eden<false>>(down, wide);
}

Variant eden_pair_variant(bool search, bool wide) {
    return search ? variant_of<Eden<true>, Eden<true>>(wide)
                  : variant_of<Eden<false>, Eden<false>>(wide);
}

}  // namespace nvfp4::cuda
