// Renders a scene from a file and writes image and gradients: the core without Python, for machines that are emulated.
// Input: int32 n, width, height, links; float32 means, quats, scales, opacities, sh (n, 9, 3); int32 link_index;
// float64 Ts_cam_link (links, 4, 4), K (3, 3); float32 dL/drgb (height, width, 3).
// Output: float32 rgb, gradients in the order of the input, float64 gradients of Ts_cam_link, J^T J (6 links squared).
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "engine.h"

using namespace kinesplat;

template <typename T>
static std::vector<T> read(FILE *file, size_t count) {
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, file) != count) std::exit(2);
    return values;
}

template <typename T>
static void write(FILE *file, const std::vector<T> &values) {
    if (std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) std::exit(3);
}

int main(int argc, char **argv) {
    if (argc != 3) return 1;
    FILE *in = std::fopen(argv[1], "rb");
    if (!in) return 1;
    std::vector<int32_t> size = read<int32_t>(in, 4);
    size_t n = static_cast<size_t>(size[0]), pixels = static_cast<size_t>(size[1]) * size[2];
    size_t links = static_cast<size_t>(size[3]);
    auto means = read<float>(in, 3 * n), quats = read<float>(in, 4 * n), scales = read<float>(in, 3 * n);
    auto opacities = read<float>(in, n), sh = read<float>(in, 27 * n);
    auto link_index = read<int32_t>(in, n);
    auto Ts = read<double>(in, 16 * links), K = read<double>(in, 9);
    auto v_rgb = read<float>(in, 3 * pixels);
    std::fclose(in);

    std::vector<float> background{0.2f, 0.5f, 0.9f}, rgb(3 * pixels);
    std::vector<int32_t> zero{0};
    Scene s;
    s.images = s.sets = 1;
    s.n = size[0];
    s.links = size[3];
    s.coefficients = 9;
    s.means = means.data();
    s.quats = quats.data();
    s.scales = scales.data();
    s.opacities = opacities.data();
    s.sh = sh.data();
    s.link_index = link_index.data();
    s.Ts_cam_link = Ts.data();
    s.K = K.data();
    s.set_of_image = zero.data();
    s.background = background.data();
    s.width = size[1];
    s.height = size[2];
    s.eps2d = 0.3;

    Options options{find_kernels(""), 2};
    FramePtr frame = take_frame(1);
    Images out;
    out.rgb = rgb.data();
    forward(s, options, *frame, out);
    ImageGradients incoming;
    incoming.rgb = v_rgb.data();
    std::vector<float> v_means(means.size()), v_quats(quats.size()), v_scales(scales.size()), v_opacities(n), v_sh(sh.size());
    std::vector<double> v_Ts(Ts.size()), loss(1), gradient(6 * links), hessian(36 * links * links);
    Gradients g;
    g.means = v_means.data();
    g.quats = v_quats.data();
    g.scales = v_scales.data();
    g.opacities = v_opacities.data();
    g.sh = v_sh.data();
    g.Ts_cam_link = v_Ts.data();
    backward(s, options, *frame, incoming, g);
    Target target;
    target.rgb = v_rgb.data();
    target.target_of_image = zero.data();
    normal_equations(s, options, *frame, target, {loss.data(), gradient.data(), hessian.data()});

    FILE *file = std::fopen(argv[2], "wb");
    if (!file) return 1;
    for (const auto *values : {&rgb, &v_means, &v_quats, &v_scales, &v_opacities, &v_sh}) write(file, *values);
    write(file, v_Ts);
    write(file, hessian);
    return std::fclose(file);
}
