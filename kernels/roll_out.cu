// The unicycle of alpamayo.roll_out in CUDA C++, beside `_roll_out` in flow_step.py, which is the same in Triton.
//
// In Triton a program works on tiles, and the compiler decides which thread has what. Here that is
// written out. A warp is 32 threads that run in step, its lanes. It drives one car, a lane a step of
// 0.1 s, and goes on with the next 32 steps from where the last lane ended. What is a tl.cumsum over a
// tile there are shuffles here, in which a lane reads a register of another.

__device__ float running_sum(float x) {
    for (int far = 1; far < 32; far *= 2) {  // of 2, 4, ... 32 lanes
        float before = __shfl_up_sync(0xffffffff, x, far);
        if (threadIdx.x % 32 >= far) x += before;
    }
    return x;
}

__device__ float of_last_lane(float x) { return __shfl_sync(0xffffffff, x, 31); }

// actions (cars, T): acceleration m/s^2, curvature 1/m; v0 (cars): m/s. xyz (cars, T, 3), rot (cars, T, 9).
extern "C" __global__ void roll_out(const float2* actions, const float* v0, float* xyz, float* rot,
                                    int cars, int T) {
    const float dt = 0.1f;  // seconds, alpamayo.DT
    int car = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (car >= cars) return;  // all lanes of the warp do
    float v = v0[car], yaw = 0, x = 0, y = 0;
    for (int t = threadIdx.x % 32; t - threadIdx.x % 32 < T; t += 32) {
        float2 u = t < T ? actions[car * T + t] : make_float2(0, 0);
        float v1 = v + running_sum(dt * u.x), v_before = v1 - dt * u.x;
        float turn = u.y * (dt * v_before + dt * dt / 2 * u.x);
        float yaw1 = yaw + running_sum(turn), yaw_before = yaw1 - turn;
        float c = cosf(yaw1), s = sinf(yaw1);
        float x1 = x + running_sum(dt / 2 * (v_before * cosf(yaw_before) + v1 * c));
        float y1 = y + running_sum(dt / 2 * (v_before * sinf(yaw_before) + v1 * s));
        if (t < T) {
            float at[3] = {x1, y1, 0}, turned[9] = {c, -s, 0, s, c, 0, 0, 0, 1};
            for (int i = 0; i < 3; i++) xyz[3 * (car * T + t) + i] = at[i];
            for (int i = 0; i < 9; i++) rot[9 * (car * T + t) + i] = turned[i];
        }
        v = of_last_lane(v1), yaw = of_last_lane(yaw1), x = of_last_lane(x1), y = of_last_lane(y1);
    }
}
