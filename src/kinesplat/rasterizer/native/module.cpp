// Python bindings: shapes are checked here, everything else happens in the engine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "engine.h"

namespace nb = nanobind;
using namespace kinesplat;

namespace {

template <typename T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

// Pointer to an array of exactly this shape; null for a missing optional one.
template <typename T>
T *checked(const Array<T> &array, const char *name, std::initializer_list<size_t> shape) {
    if (!array.is_valid()) return nullptr;
    bool fits = array.ndim() == shape.size();
    size_t i = 0;
    for (size_t extent : shape) fits = fits && array.shape(i++) == extent;
    if (!fits) throw nb::value_error((std::string(name) + " has an unexpected shape").c_str());
    return array.data();
}

const Kernels &kernels_named(const std::string &level) {
    const Kernels *kernels = find_kernels(level);
    if (kernels) return *kernels;
    std::string names;
    for (const Kernels *k : available_kernels()) names += std::string(names.empty() ? "" : ", ") + k->name;
    throw nb::value_error(("SIMD level '" + level + "' is not available here; available: " + names).c_str());
}


struct Splats {
    Array<const float> means, quats, scales, opacities, sh;
};

struct Links {
    Array<const int32_t> index;
    Array<const float> weights;
    Array<const double> Ts_cam_link;
};

struct Views {
    Array<const double> K;
    Array<const float> background;
    Array<const int32_t> set_of_image;
    int width, height;
    double eps2d;
    bool along_axis;
};

struct PyScene {
    Splats splats;
    Links links;
    Views views;
    Scene scene;

    PyScene(Splats a, Links b, Views c) : splats(std::move(a)), links(std::move(b)), views(std::move(c)) {
        if (splats.sh.ndim() != 4 || links.index.ndim() != 2 || links.Ts_cam_link.ndim() != 4)
            throw nb::value_error("sh, link_index or Ts_cam_link has an unexpected number of dimensions");
        size_t sets = splats.sh.shape(0), n = splats.sh.shape(1), k = splats.sh.shape(2), m = links.index.shape(1);
        size_t images = links.Ts_cam_link.shape(0), count = links.Ts_cam_link.shape(1);
        scene.images = static_cast<int>(images);
        scene.sets = static_cast<int>(sets);
        scene.n = static_cast<int>(n);
        scene.links = static_cast<int>(count);
        scene.links_per_splat = static_cast<int>(m);
        scene.coefficients = static_cast<int>(k);
        scene.means = checked(splats.means, "means", {sets, n, 3});
        scene.quats = checked(splats.quats, "quats", {sets, n, 4});
        scene.scales = checked(splats.scales, "scales", {sets, n, 3});
        scene.opacities = checked(splats.opacities, "opacities", {sets, n});
        scene.sh = checked(splats.sh, "sh", {sets, n, k, 3});
        scene.link_index = checked(links.index, "link_index", {n, m});
        scene.link_weights = checked(links.weights, "link_weights", {n, m});
        scene.Ts_cam_link = checked(links.Ts_cam_link, "Ts_cam_link", {images, count, 4, 4});
        scene.K = checked(views.K, "K", {images, 3, 3});
        scene.background = checked(views.background, "background", {images, 3});
        scene.set_of_image = checked(views.set_of_image, "set_of_image", {images});
        scene.width = views.width;
        scene.height = views.height;
        scene.eps2d = views.eps2d;
        scene.along_axis = views.along_axis;
        if (k != 1 && k != 4 && k != 9 && k != 16) throw nb::value_error("sh holds none of 1, 4, 9, 16 coefficients");
        if (m < 1 || m > kMaxLinksPerSplat || (m > 1 && !scene.link_weights))
            throw nb::value_error("link_index needs 1 to 4 columns, and link_weights where it has more than one");
        for (size_t i = 0; i < n * m; ++i)
            if (scene.link_index[i] < 0 || scene.link_index[i] >= scene.links)
                throw nb::value_error(("link_index holds " + std::to_string(scene.link_index[i]) +
                                       "; Ts_world_link holds links 0 to " + std::to_string(scene.links - 1))
                                          .c_str());
        for (size_t i = 0; i < images; ++i)
            if (scene.set_of_image[i] < 0 || scene.set_of_image[i] >= scene.sets)
                throw nb::value_error("set_of_image points outside the sets");
    }
};

struct PyFrame {
    FramePtr frame;
    Options options;
};

std::string bad_input(const PyScene &s, int threads, const std::string &level) {
    Options options{&kernels_named(level), threads};
    nb::gil_scoped_release release;
    return find_bad_input(s.scene, options);
}

PyFrame run_forward(const PyScene &py, Array<float> rgb, Array<float> alpha, Array<float> depth,
                    Array<int32_t> link_id, Array<float> contribution, int threads, const std::string &level) {
    const Scene &s = py.scene;
    size_t images = static_cast<size_t>(s.images), h = static_cast<size_t>(s.height), w = static_cast<size_t>(s.width);
    Images out;
    out.rgb = checked(rgb, "rgb", {images, h, w, 3});
    out.alpha = checked(alpha, "alpha", {images, h, w});
    out.depth = checked(depth, "depth", {images, h, w});
    out.link_id = checked(link_id, "link_id", {images, h, w});
    out.contribution = checked(contribution, "contribution", {images, static_cast<size_t>(s.n)});
    PyFrame frame{take_frame(s.images), {&kernels_named(level), threads}};
    nb::gil_scoped_release release;
    forward(s, frame.options, *frame.frame, out);
    return frame;
}

struct PyGradients {
    Array<float> means, quats, scales, opacities, sh;
    Array<double> Ts_cam_link, K;
    Array<float> link_weights;
};

void run_backward(const PyScene &py, PyFrame &frame, Array<const float> v_rgb, Array<const float> v_alpha,
                  Array<const float> v_depth, Array<const float> depth, const PyGradients &g, int threads) {
    const Scene &s = py.scene;
    size_t images = static_cast<size_t>(s.images), h = static_cast<size_t>(s.height), w = static_cast<size_t>(s.width);
    size_t sets = static_cast<size_t>(s.sets), n = static_cast<size_t>(s.n), links = static_cast<size_t>(s.links);
    ImageGradients in;
    in.rgb = checked(v_rgb, "v_rgb", {images, h, w, 3});
    in.alpha = checked(v_alpha, "v_alpha", {images, h, w});
    in.v_depth = checked(v_depth, "v_depth", {images, h, w});
    in.depth = checked(depth, "depth", {images, h, w});
    if (in.v_depth && !in.depth) throw nb::value_error("v_depth needs depth");
    Gradients out;
    out.means = checked(g.means, "v_means", {sets, n, 3});
    out.quats = checked(g.quats, "v_quats", {sets, n, 4});
    out.scales = checked(g.scales, "v_scales", {sets, n, 3});
    out.opacities = checked(g.opacities, "v_opacities", {sets, n});
    out.sh = checked(g.sh, "v_sh", {sets, n, static_cast<size_t>(s.coefficients), 3});
    out.Ts_cam_link = checked(g.Ts_cam_link, "v_Ts_cam_link", {images, links, 4, 4});
    out.K = checked(g.K, "v_K", {images, 3, 3});
    out.link_weights = checked(g.link_weights, "v_link_weights", {n, static_cast<size_t>(s.links_per_splat)});
    Options options{frame.options.kernels, threads};
    nb::gil_scoped_release release;
    backward(s, options, *frame.frame, in, out);
}

struct PyTarget {
    Array<const float> rgb, alpha, rgb_weight, alpha_weight, backdrop;
    Array<const int32_t> target_of_image;
};

std::string run_normal_equations(const PyScene &py, const PyTarget &t, Array<double> loss, Array<double> gradient,
                          Array<double> hessian, int threads, const std::string &level) {
    const Scene &s = py.scene;
    if (s.link_weights) throw nb::value_error("normal equations need one link per splat");
    size_t images = static_cast<size_t>(s.images), h = static_cast<size_t>(s.height), w = static_cast<size_t>(s.width);
    size_t rows = 6 * static_cast<size_t>(s.links), targets = t.rgb.ndim() ? t.rgb.shape(0) : 0;
    Target target;
    target.rgb = checked(t.rgb, "target rgb", {targets, h, w, 3});
    target.alpha = checked(t.alpha, "target alpha", {targets, h, w});
    target.rgb_weight = checked(t.rgb_weight, "rgb weights", {targets, h, w});
    target.alpha_weight = checked(t.alpha_weight, "alpha weights", {targets, h, w});
    target.backdrop = checked(t.backdrop, "backdrop", {targets, h, w, 3});
    target.target_of_image = checked(t.target_of_image, "target_of_image", {images});
    for (size_t i = 0; i < images; ++i)
        if (target.target_of_image[i] < 0 || static_cast<size_t>(target.target_of_image[i]) >= targets)
            throw nb::value_error("target_of_image points outside the targets");
    NormalEquations out{checked(loss, "loss", {images}), checked(gradient, "gradient", {images, rows}),
                        checked(hessian, "hessian", {images, rows, rows})};
    Options options{&kernels_named(level), threads};
    FramePtr frame = take_frame(s.images);
    nb::gil_scoped_release release;
    std::string problem = find_bad_target(target, targets * h * w, options);
    if (problem.empty()) normal_equations(s, options, *frame, target, out);
    return problem;
}

void run_photometric(Array<const float> rendered, Array<const float> truth, double weight, Array<double> loss,
                     Array<float> gradient, int threads, const std::string &level) {
    if (rendered.ndim() != 4) throw nb::value_error("rendered has an unexpected number of dimensions");
    size_t images = rendered.shape(0), h = rendered.shape(1), w = rendered.shape(2);
    Photometric p;
    p.images = static_cast<int>(images);
    p.width = static_cast<int>(w);
    p.height = static_cast<int>(h);
    p.weight = weight;
    p.rendered = checked(rendered, "rendered", {images, h, w, 3});
    p.truth = checked(truth, "truth", {images, h, w, 3});
    p.gradient = checked(gradient, "gradient", {images, h, w, 3});
    double *out = checked(loss, "loss", {images});
    Options options{&kernels_named(level), threads};
    nb::gil_scoped_release release;
    photometric(p, options, out);
}

std::vector<std::string> level_names() {
    std::vector<std::string> names;
    for (const Kernels *k : available_kernels()) names.emplace_back(k->name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // a graph that is alive at exit is no bug
    m.doc() = "Native Gaussian splatting on the CPU; used through kinesplat.rasterizer.";
    nb::class_<Splats>(m, "Splats")
        .def(nb::init<Array<const float>, Array<const float>, Array<const float>, Array<const float>,
                      Array<const float>>());
    nb::class_<Links>(m, "Links")
        .def(nb::init<Array<const int32_t>, Array<const float>, Array<const double>>(), nb::arg("index"),
             nb::arg("weights").none(), nb::arg("Ts_cam_link"));
    nb::class_<Views>(m, "Views")
        .def(nb::init<Array<const double>, Array<const float>, Array<const int32_t>, int, int, double, bool>());
    nb::class_<PyScene>(m, "Scene").def(nb::init<Splats, Links, Views>());
    nb::class_<PyFrame>(m, "Frame").def_prop_ro("bytes", [](const PyFrame &f) { return f.frame->bytes(); });
    nb::class_<PyGradients>(m, "Gradients")
        .def(nb::init<Array<float>, Array<float>, Array<float>, Array<float>, Array<float>, Array<double>,
                      Array<double>, Array<float>>(),
             nb::arg("means").none(), nb::arg("quats").none(), nb::arg("scales").none(), nb::arg("opacities").none(),
             nb::arg("sh").none(), nb::arg("Ts_cam_link").none(), nb::arg("K").none(), nb::arg("link_weights").none());
    m.def("bad_input", &bad_input, nb::arg("scene"), nb::arg("threads"), nb::arg("level"));
    m.def("forward", &run_forward, nb::arg("scene"), nb::arg("rgb").none(), nb::arg("alpha").none(),
          nb::arg("depth").none(), nb::arg("link_id").none(), nb::arg("contribution").none(), nb::arg("threads"),
          nb::arg("level"));
    m.def("backward", &run_backward, nb::arg("scene"), nb::arg("frame"), nb::arg("v_rgb").none(),
          nb::arg("v_alpha").none(), nb::arg("v_depth").none(), nb::arg("depth").none(), nb::arg("gradients"),
          nb::arg("threads"));
    nb::class_<PyTarget>(m, "Target")
        .def(nb::init<Array<const float>, Array<const float>, Array<const float>, Array<const float>,
                      Array<const float>, Array<const int32_t>>(),
             nb::arg("rgb"), nb::arg("alpha").none(), nb::arg("rgb_weight").none(), nb::arg("alpha_weight").none(),
             nb::arg("backdrop").none(), nb::arg("target_of_image"));
    m.def("normal_equations", &run_normal_equations, nb::arg("scene"), nb::arg("target"), nb::arg("loss"),
          nb::arg("gradient"), nb::arg("hessian"), nb::arg("threads"), nb::arg("level"),
          "Fills loss, gradient and hessian; returns what was wrong with the target, else an empty string.");
    m.def("photometric", &run_photometric, nb::arg("rendered"), nb::arg("truth"), nb::arg("weight"), nb::arg("loss"),
          nb::arg("gradient").none(), nb::arg("threads"), nb::arg("level"));
    nb::class_<StageTimes>(m, "StageTimes")
        .def_ro("prepare", &StageTimes::prepare)
        .def_ro("forward_blend", &StageTimes::forward_blend)
        .def_ro("backward_blend", &StageTimes::backward_blend)
        .def_ro("backward_splats", &StageTimes::backward_splats)
        .def_ro("lane_evaluations", &StageTimes::lane_evaluations)
        .def_ro("frame_bytes", &StageTimes::frame_bytes);
    m.def("profile_stages", [](const PyScene &s, const std::string &level, int repeats) {
        Options options{&kernels_named(level), 1};
        nb::gil_scoped_release release;
        return profile_stages(s.scene, options, repeats);
    }, nb::arg("scene"), nb::arg("level"), nb::arg("repeats"), "Times of the stages on one thread.");
    m.def("levels", &level_names, "SIMD levels that this machine can run, best first.");
    m.def("fma_peak", [](const std::string &level, double seconds) {
        const Kernels &k = kernels_named(level);
        nb::gil_scoped_release release;
        return k.fma_peak(seconds);
    }, nb::arg("level"), nb::arg("seconds"), "Measured multiply-add peak of one thread [FLOP/s].");
}
