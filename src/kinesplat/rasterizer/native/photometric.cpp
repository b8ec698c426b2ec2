#include "engine.h"

namespace kinesplat {

void photometric(const Photometric &p, const Options &options, double *loss) {
    int bands = (p.height + kPhotometricBand - 1) / kPhotometricBand;
    std::vector<double> sums(static_cast<size_t>(p.images) * bands);
    for_units(options, p.images * bands, [&](int unit, int) {
        int begin = unit % bands * kPhotometricBand, end = begin + kPhotometricBand;
        sums[unit] = options.kernels->photometric_band(p, unit / bands, begin, end < p.height ? end : p.height,
                                                       thread_scratch());
    });
    for (int image = 0; image < p.images; ++image) {
        double total = 0;
        for (int band = 0; band < bands; ++band) total += sums[static_cast<size_t>(image) * bands + band];
        loss[image] = total / (3.0 * p.width * p.height);
    }
}

}  // namespace kinesplat
