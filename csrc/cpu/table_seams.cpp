// What joins two blocks: gate, residual and the next norm in one pass.
#include "gate_residual_layer_norm_modulate.h"
#include "residual_norm_modulate_bwd.h"
#include "tables.h"

namespace zeroblock {

extern const SeamKernels ZB_TABLE(seams);
const SeamKernels ZB_TABLE(seams) = {
    gate_residual_layer_norm_modulate_fwd,
    gate_residual_layer_norm_modulate_bwd,
    gate_residual_layer_norm_modulate_bwd_workspace,
    residual_norm_modulate_fwd,
    residual_norm_modulate_bwd,
    residual_norm_modulate_bwd_workspace,
};

}  // namespace zeroblock
