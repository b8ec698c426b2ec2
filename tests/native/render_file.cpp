// Renders a scene from a file and writes image and gradients: the core without Python, for machines that are emulated.
// Input: int32 n, width, height, links; float32 means, quats, scales, opacities, sh (n, 9, 3); int32 link_index;
// float64 Ts_cam_link (links, 4, 4), K (3, 3); float32 dL/drgb (height, width, 3).
// Output: float32 rgb, gradients in the order of the input, float64 gradients of Ts_cam_link, J^T J (6 links squared).
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "owned_scene.h"

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
    OwnedScene s;
    s.means = read<float>(in, 3 * n);
    s.quats = read<float>(in, 4 * n);
    s.scales = read<float>(in, 3 * n);
    s.opacities = read<float>(in, n);
    s.sh = read<float>(in, 27 * n);
    s.link_index = read<int32_t>(in, n);
    s.Ts = read<double>(in, 16 * links);
    s.K = read<double>(in, 9);
    auto v_rgb = read<float>(in, 3 * pixels);
    std::fclose(in);
    s.background = {0.2f, 0.5f, 0.9f};
    s.set_of_image = {0};
    s.finish(1, size[0], size[3], 9, size[1], size[2]);

    std::vector<float> rgb(3 * pixels);
    Options options{find_kernels(""), 2};
    FramePtr frame = take_frame(1);
    Images out;
    out.rgb = rgb.data();
    forward(s.scene, options, *frame, out);
    ImageGradients incoming;
    incoming.rgb = v_rgb.data();
    backward(s.scene, options, *frame, incoming, s.gradients(false));
    Target target;
    target.rgb = v_rgb.data();
    target.target_of_image = s.set_of_image.data();
    normal_equations(s.scene, options, *frame, target, {s.loss.data(), s.gradient.data(), s.hessian.data()});

    FILE *file = std::fopen(argv[2], "wb");
    if (!file) return 1;
    for (const auto *values : {&rgb, &s.v_means, &s.v_quats, &s.v_scales, &s.v_opacities, &s.v_sh}) write(file, *values);
    write(file, s.v_Ts);
    write(file, s.hessian);
    return std::fclose(file);
}
