// A scene with the arrays that it and its gradients lie in.
#pragma once
#include <cstdint>
#include <vector>

#include "engine.h"

struct OwnedScene {
    std::vector<float> means, quats, scales, opacities, sh, background;
    std::vector<double> Ts, K;
    std::vector<int32_t> link_index, set_of_image;
    std::vector<float> v_means, v_quats, v_scales, v_opacities, v_sh;
    std::vector<double> v_Ts, v_K, loss, gradient, hessian;
    kinesplat::Scene scene;

    // Once the arrays of the scene are filled: points at them and makes room for the gradients.
    void finish(int images, int n, int links, int coefficients, int width, int height) {
        v_means.resize(means.size());
        v_quats.resize(quats.size());
        v_scales.resize(scales.size());
        v_opacities.resize(opacities.size());
        v_sh.resize(sh.size());
        v_Ts.resize(Ts.size());
        v_K.resize(K.size());
        size_t L = static_cast<size_t>(links), I = static_cast<size_t>(images);
        loss.resize(I);
        gradient.resize(6 * L * I);
        hessian.resize(36 * L * L * I);
        scene.images = images;
        scene.sets = 1;
        scene.n = n;
        scene.links = links;
        scene.coefficients = coefficients;
        scene.means = means.data();
        scene.quats = quats.data();
        scene.scales = scales.data();
        scene.opacities = opacities.data();
        scene.sh = sh.data();
        scene.link_index = link_index.data();
        scene.Ts_cam_link = Ts.data();
        scene.K = K.data();
        scene.set_of_image = set_of_image.data();
        scene.background = background.data();
        scene.width = width;
        scene.height = height;
        scene.eps2d = 0.3;
    }

    // Where the backward pass writes; of the transforms and intrinsics alone with `pose_only`.
    kinesplat::Gradients gradients(bool pose_only) {
        kinesplat::Gradients g;
        g.Ts_cam_link = v_Ts.data();
        g.K = v_K.data();
        if (pose_only) return g;
        g.means = v_means.data();
        g.quats = v_quats.data();
        g.scales = v_scales.data();
        g.opacities = v_opacities.data();
        g.sh = v_sh.data();
        return g;
    }
};
