// Gate, residual and the next layer norm in one pass.
#include "gate_residual_layer_norm_modulate.h"
#include "tables.h"

namespace zeroblock {

extern const GatedNormKernels ZB_TABLE(gated_norms);
const GatedNormKernels ZB_TABLE(gated_norms) = {
    gate_residual_layer_norm_modulate_fwd,
    gate_residual_layer_norm_modulate_bwd,
    gate_residual_layer_norm_modulate_bwd_workspace,
};

}  // namespace zeroblock
