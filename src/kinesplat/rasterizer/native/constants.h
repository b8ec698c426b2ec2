// Constants of the forward pass, defined once and shared with the backward pass (and mirrored by reference.py).
#pragma once

namespace kinesplat {

constexpr float kAlphaMax = 0.99f;              // opacity a single splat may reach
constexpr float kLog2AlphaMin = -7.9943534369f; // log2(1/255): fainter contributions are dropped
constexpr float kTransmittanceMin = 1e-4f;      // the splat that would go below it is not composited
constexpr double kNear = 0.01;                  // near plane [m]
constexpr double kJacobianGuard = 0.3;          // margin on x/z and y/z, in half fields of view (gsplat)
constexpr float kDepthAlphaMin = 1e-10f;
constexpr float kMedianTransmittance = 0.5f;
constexpr double kWhitening2 = 0.72134752044448170368; // log2(e)/2: 2^-(u^2+v^2) = exp(-sigma) in whitened u, v

constexpr int kLanes = 16;       // one vector: the pixels of a block, or 16 splats
constexpr int kBlock = 4;        // pixels along a block
constexpr int kTile = 16;        // pixels along a tile
constexpr float kHalfTile = 8.0f;
constexpr int kTileBlocks = 16;  // blocks of a tile
constexpr int kMaxLinksPerSplat = 4;
constexpr int kMaxCoefficients = 16;

}  // namespace kinesplat
