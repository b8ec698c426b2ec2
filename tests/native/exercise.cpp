// Every entry of the core on random scenes, at every level and on several threads: what sanitizers and valgrind watch.
// Several callers use the pool at a time. Prints one line per level; the numbers must not depend on the threads.
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>

#include "owned_scene.h"

using namespace kinesplat;

namespace {

struct Data : OwnedScene {
    std::vector<float> rgb, alpha, depth, contribution, v_rgb, plane;
    std::vector<int32_t> link_id;

    Data(int seed, int n, int images, int width, int height, int links, int coefficients) {
        std::mt19937 random(static_cast<uint32_t>(seed));
        auto normal = [&](size_t count, float sigma) {
            std::normal_distribution<float> d(0.0f, sigma);
            std::vector<float> v(count);
            for (float &x : v) x = d(random);
            return v;
        };
        size_t N = static_cast<size_t>(n), pixels = static_cast<size_t>(width) * height * images;
        means = normal(3 * N, 0.4f);
        quats = normal(4 * N, 1.0f);
        scales = normal(3 * N, 0.05f);
        opacities = normal(N, 0.5f);
        for (float &x : scales) x = std::fabs(x) + 1e-4f;
        for (float &x : opacities) x = std::fmin(std::fabs(x), 1.0f);
        sh = normal(3 * N * static_cast<size_t>(coefficients), 0.3f);
        background = normal(3 * static_cast<size_t>(images), 0.3f);
        v_rgb = normal(3 * pixels, 1.0f);
        plane = normal(pixels, 0.3f);
        for (float &x : plane) x = std::fabs(x);
        for (int i = 0; i < n; ++i) link_index.push_back(i * links / n);
        for (int i = 0; i < images; ++i) {
            set_of_image.push_back(0);
            for (double k : {1.1 * width, 0.0, 0.5 * width, 0.0, 1.1 * width, 0.5 * height, 0.0, 0.0, 1.0}) K.push_back(k);
            for (int l = 0; l < links; ++l)
                for (int j = 0; j < 16; ++j) Ts.push_back(j % 5 == 0 ? 1.0 : j == 11 ? 2.0 + 0.05 * l + 0.01 * i : 0.0);
        }
        rgb.resize(3 * pixels);
        alpha.resize(pixels);
        depth.resize(pixels);
        link_id.resize(pixels);
        contribution.resize(N * static_cast<size_t>(images));
        finish(images, n, links, coefficients, width, height);
    }

    double run(const Options &options, bool pose_only) {
        FramePtr frame = take_frame(scene.images);
        Images out{rgb.data(), alpha.data(), depth.data(), link_id.data(), contribution.data()};
        std::string problem = find_bad_input(scene, options);
        if (!problem.empty()) std::printf("bad input: %s\n", problem.c_str());
        forward(scene, options, *frame, out);
        ImageGradients in{v_rgb.data(), plane.data(), plane.data(), depth.data()};
        backward(scene, options, *frame, in, gradients(pose_only));
        Target target;
        target.rgb = rgb.data();
        target.alpha = plane.data();
        target.rgb_weight = plane.data();
        target.target_of_image = set_of_image.data();
        normal_equations(scene, options, *frame, target, {loss.data(), gradient.data(), hessian.data()});
        Photometric p;
        p.images = scene.images;
        p.width = scene.width;
        p.height = scene.height;
        p.weight = 0.2;
        p.rendered = rgb.data();
        p.truth = v_rgb.data();
        std::vector<float> v(rgb.size());
        p.gradient = v.data();
        std::vector<double> value(static_cast<size_t>(scene.images));
        photometric(p, options, value.data());
        double total = 0;
        for (double x : v_Ts) total += x;
        for (double x : hessian) total += x;
        for (float x : v) total += x;
        for (float x : v_sh) total += pose_only ? 0.0 : static_cast<double>(x);
        return total + value[0] + loss[0];
    }
};

}  // namespace

int main() {
    int failures = 0;
    for (const Kernels *kernels : available_kernels()) {
        double sums[2][3];
        for (int threads = 1; threads <= 3; ++threads) {
            auto all = [&](int seed) {
                double total = 0;
                const int sizes[5][6] = {{300, 1, 70, 45, 3, 9}, {1, 1, 1, 1, 1, 1},      {700, 2, 33, 17, 2, 4},
                                         {90, 16, 20, 31, 4, 16}, {40, 3, 128, 130, 1, 9}};
                for (const int *z : sizes) {
                    Data data(seed, z[0], z[1], z[2], z[3], z[4], z[5]);
                    for (bool pose_only : {true, false}) total += data.run({kernels, threads}, pose_only);
                }
                return total;
            };
            double other = 0;
            std::thread caller([&] { other = all(2); });
            sums[0][threads - 1] = all(1);
            caller.join();
            sums[1][threads - 1] = other;
        }
        bool same = true;
        for (const auto &row : sums) same = same && row[0] == row[1] && row[0] == row[2];
        std::printf("%s: %.17g %.17g%s\n", kernels->name, sums[0][0], sums[1][0], same ? "" : " DIFFERS BETWEEN THREADS");
        failures += !same;
    }
    return failures;
}
