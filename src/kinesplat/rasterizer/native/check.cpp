// Values that cannot be rendered.
#include "engine.h"

namespace kinesplat {

std::string find_bad_input(const Scene &s, const Options &options) {
    size_t n = static_cast<size_t>(s.sets) * static_cast<size_t>(s.n);
    const struct {
        const char *name;
        const float *values;
        size_t count;
    } named[] = {{"gaussians.means", s.means, 3 * n},
                 {"gaussians.quats", s.quats, 4 * n},
                 {"gaussians.scales", s.scales, 3 * n},
                 {"gaussians.opacities", s.opacities, n},
                 {"gaussians.sh", s.sh, 3 * n * static_cast<size_t>(s.coefficients)},
                 {"link_weights", s.link_weights, s.link_weights ? static_cast<size_t>(s.n) * s.links_per_splat : 0},
                 {"background", s.background, 3 * static_cast<size_t>(s.images)}};
    for (const auto &input : named)
        if (!options.kernels->all_finite(input.values, input.count)) return std::string(input.name) + " contains NaN or infinity";
    double total = 0;
    for (size_t i = 0; i < static_cast<size_t>(s.images) * s.links * 16; ++i) total += s.Ts_cam_link[i] * 0.0;
    if (total != 0.0) return "Ts_world_link or camera T_cam_world contains NaN or infinity";
    for (size_t i = 0; i < static_cast<size_t>(s.images) * 9; ++i) total += s.K[i] * 0.0;
    if (total != 0.0) return "camera K contains NaN or infinity";
    for (int i = 0; i < s.images; ++i) {
        if (s.focal(i, 0) <= 0 || s.focal(i, 1) <= 0) return "camera K has a focal length that is not positive";
        if (s.K[9 * i + 1] != 0) return "camera K has skew (K[0, 1] is not 0), which no backend renders";
    }
    for (size_t i = 0; i < n; ++i) {
        const float *q = s.quats + 4 * i;
        if (q[0] == 0 && q[1] == 0 && q[2] == 0 && q[3] == 0) return "gaussians.quats contains a quaternion of length zero";
    }
    return {};
}

std::string find_bad_target(const Target &t, size_t pixels, const Options &options) {
    const struct {
        const char *name;
        const float *values;
        size_t count;
    } named[] = {{"target rgb", t.rgb, 3 * pixels},
                 {"target alpha", t.alpha, pixels},
                 {"rgb_weight", t.rgb_weight, pixels},
                 {"alpha_weight", t.alpha_weight, pixels},
                 {"backdrop", t.backdrop, 3 * pixels}};
    for (const auto &input : named)
        if (input.values && !options.kernels->all_finite(input.values, input.count))
            return std::string(input.name) + " contains NaN or infinity";
    return {};
}

}  // namespace kinesplat
