// Norms and activations of images, and what ends a zero branch.
#include "activation.h"
#include "add_bias.h"
#include "channel_rms_norm_silu_bwd.h"
#include "group_norm_silu_bwd.h"
#include "tables.h"

namespace zeroblock {

extern const ImageKernels ZB_TABLE(images);
const ImageKernels ZB_TABLE(images) = {
    group_norm_silu_fwd,
    group_norm_silu_bwd,
    group_norm_silu_fwd_workspace,
    group_norm_silu_bwd_workspace,
    group_norm_statistics,
    group_norm_affine,
    channel_rms_norm_silu_fwd,
    channel_rms_norm_silu_bwd,
    channel_rms_norm_silu_fwd_workspace,
    channel_rms_norm_silu_bwd_workspace,
    activation_fwd,
    activation_bwd,
    add_bias,
    residual_if_zero,
};

}  // namespace zeroblock
