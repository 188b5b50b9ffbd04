// Minimises the distance of a vector to a target with AdamW: gradient = parameter - target.
#include <fusedopt.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include "device.hpp"

namespace {

struct Destroy {
    void operator()(fusedopt_context *context) const { fusedopt_destroy(context); }
};

void check(fusedopt_status status)
{
    if (status != FUSEDOPT_OK)
        throw std::runtime_error(std::string(fusedopt_status_name(status)) + ": " +
                                 fusedopt_last_error());
}

float distance(const std::vector<float> &values, float target)
{
    float largest = 0;
    for (float value : values)
        largest = std::fmax(largest, std::fabs(value - target));
    return largest;
}

void run()
{
    fusedopt_context *made = nullptr;
    check(fusedopt_init(&made, 0));
    std::unique_ptr<fusedopt_context, Destroy> context(made);

    constexpr std::size_t size = 1000;
    constexpr float target = 3;
    Driver driver;
    Array param(driver, std::vector<float>(size, 1)), grad(driver, std::vector<float>(size));
    Array mean(driver, std::vector<float>(size)), square(driver, std::vector<float>(size));

    const std::int64_t numel = size;
    void *params[] = {param.address()};
    const void *grads[] = {grad.address()};
    void *means[] = {mean.address()}, *squares[] = {square.address()};
    fusedopt_tensors set{};
    set.count = 1;
    set.numel = &numel;
    set.param = params;
    set.grad = grads;
    set.state[0] = means;
    set.state[1] = squares;
    set.param_type = set.grad_type = set.state_type = FUSEDOPT_FLOAT32;

    fusedopt_adamw group{};
    group.lr = 0.1;
    group.beta1 = 0.9;
    group.beta2 = 0.99;
    group.eps = 1e-8;
    fusedopt_control control{};
    control.max_norm = 100;

    for (group.step = 1; group.step <= 100; ++group.step) {
        std::vector<float> values = param.values();
        for (float &value : values)
            value -= target;
        driver.write(reinterpret_cast<std::uint64_t>(grads[0]), values.data(),
                     size * sizeof(float));
        check(fusedopt_adamw_step(context.get(), &set, 1, &group, 1, &control, nullptr));
    }
    const float left = distance(param.values(), target);
    std::printf("fusedopt %s, %zu kernels: %g from the target after 100 steps\n",
                fusedopt_version(), fusedopt_manifest_count(), static_cast<double>(left));
    if (!(left < 0.1f))
        throw std::runtime_error("AdamW did not come near the target");
}

} // namespace

int main()
{
    try {
        run();
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
