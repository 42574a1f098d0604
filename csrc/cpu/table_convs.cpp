// Winograd's convolutions, zero tests and conversions.
#include "is_zero.h"
#include "tables.h"
#include "vec/convert.h"
#include "winograd/wgrad.h"

namespace zeroblock {

extern const ConvKernels ZB_TABLE(convs);
const ConvKernels ZB_TABLE(convs) = {
    winograd_fwd, winograd_wgrad, winograd_pack, winograd_packed_size, is_zero, widen, narrow,
};

}  // namespace zeroblock
