// Norms and gates of rows.
#include "gate_residual.h"
#include "layer_norm_modulate_two.h"
#include "tables.h"

namespace zeroblock {

extern const RowKernels ZB_TABLE(rows);
const RowKernels ZB_TABLE(rows) = {
    layer_norm_modulate_fwd,     layer_norm_modulate_bwd,     layer_norm_modulate_bwd_workspace,
    gate_residual_fwd,           gate_residual_bwd,           gate_residual_bwd_workspace,
    layer_norm_modulate_two_fwd, layer_norm_modulate_two_bwd, layer_norm_modulate_two_bwd_workspace,
};

}  // namespace zeroblock
