// Device memory without CUDA's toolkit. A program that has it uses cudaMalloc and cudaMemcpy instead.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

class Driver {
public:
    Driver()
    {
        const char *path = std::getenv("FUSEDOPT_DRIVER");
        handle_ = dlopen(path != nullptr ? path : "libcuda.so.1", RTLD_NOW);
        if (handle_ == nullptr)
            throw std::runtime_error(dlerror());
        void *context = nullptr;
        call<unsigned>("cuInit", 0);
        call<void **, int>("cuDevicePrimaryCtxRetain", &context, 0);
        call<void *>("cuCtxPushCurrent_v2", context);
    }

    std::uint64_t allocate(std::size_t bytes)
    {
        std::uint64_t address = 0;
        call<std::uint64_t *, std::size_t>("cuMemAlloc_v2", &address, bytes);
        return address;
    }

    void write(std::uint64_t to, const void *from, std::size_t bytes)
    {
        call<std::uint64_t, const void *, std::size_t>("cuMemcpyHtoD_v2", to, from, bytes);
    }

    void read(void *to, std::uint64_t from, std::size_t bytes)
    {
        call<void *, std::uint64_t, std::size_t>("cuMemcpyDtoH_v2", to, from, bytes);
    }

    void free(std::uint64_t address) { call<std::uint64_t>("cuMemFree_v2", address); }

private:
    template <typename... Arguments> void call(const char *name, Arguments... arguments)
    {
        auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(handle_, name));
        if (function == nullptr || function(arguments...) != 0)
            throw std::runtime_error(std::string(name) + " failed");
    }

    void *handle_ = nullptr;
};

// Floats on the device.
class Array {
public:
    Array(Driver &driver, const std::vector<float> &values)
        : driver_(driver), size_(values.size()), address_(driver.allocate(size_ * sizeof(float)))
    {
        driver_.write(address_, values.data(), size_ * sizeof(float));
    }

    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;
    ~Array() { driver_.free(address_); }

    void *address() const { return reinterpret_cast<void *>(address_); }

    std::vector<float> values() const
    {
        std::vector<float> result(size_);
        driver_.read(result.data(), address_, size_ * sizeof(float));
        return result;
    }

private:
    Driver &driver_;
    std::size_t size_;
    std::uint64_t address_;
};
