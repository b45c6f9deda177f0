// A guard for CUDA devices that does nothing. A build of torch for the CPU has none, and slicing a fake CUDA tensor asks for it.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
} // namespace c10::impl
