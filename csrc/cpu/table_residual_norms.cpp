// The same with operands of every form, norms of the branch and RMS norms.
#include "residual_norm_modulate_bwd.h"
#include "tables.h"

namespace zeroblock {

extern const ResidualNormKernels ZB_TABLE(residual_norms);
const ResidualNormKernels ZB_TABLE(residual_norms) = {
    residual_norm_modulate_fwd,
    residual_norm_modulate_bwd,
    residual_norm_modulate_bwd_workspace,
};

}  // namespace zeroblock
