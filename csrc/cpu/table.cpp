// All CPU kernels of one instruction set, in one object. setup.py compiles this file once per instruction set: the
// compiler's flags choose the vectors of vec/vec.h, ZB_TABLE and ZB_ISA_NAME name the result.
#include "activation.h"
#include "add_bias.h"
#include "gate_residual.h"
#include "gate_residual_layer_norm_modulate.h"
#include "group_norm_silu_bwd.h"
#include "is_zero.h"
#include "layer_norm_modulate.h"
#include "residual_norm_modulate_bwd.h"
#include "vec/convert.h"
#include "winograd/wgrad.h"

namespace zeroblock {

extern const CpuKernels ZB_TABLE;
const CpuKernels ZB_TABLE = {
    ZB_ISA_NAME,
    group_norm_silu_fwd,
    group_norm_silu_bwd,
    group_norm_silu_fwd_workspace,
    group_norm_silu_bwd_workspace,
    layer_norm_modulate_fwd,
    layer_norm_modulate_bwd,
    layer_norm_modulate_bwd_workspace,
    gate_residual_fwd,
    gate_residual_bwd,
    gate_residual_bwd_workspace,
    gate_residual_layer_norm_modulate_fwd,
    gate_residual_layer_norm_modulate_bwd,
    gate_residual_layer_norm_modulate_bwd_workspace,
    residual_norm_modulate_fwd,
    residual_norm_modulate_bwd,
    residual_norm_modulate_bwd_workspace,
    activation_fwd,
    activation_bwd,
    add_bias,
    group_norm_statistics,
    group_norm_affine,
    winograd_fwd,
    winograd_wgrad,
    winograd_pack,
    winograd_packed_size,
    is_zero,
    residual_if_zero,
    widen,
    narrow,
};

}  // namespace zeroblock
