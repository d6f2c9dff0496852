/* The glider of Bulirsch, Nerz, Pesch and von Stryk (1993): forces of drag, lift and an updraft, at n points.
   state: range x, altitude y, velocities vx, vy, and the control, a coefficient of lift. */
#include <math.h>

static void forces_at(const double *state, double *acceleration) {
    const double mass = 100, area = 14, density = 1.13, gravity = 9.80665;
    double z = state[0] / 100 - 2.5, updraft = 2.5 * (1 - z * z) * exp(-z * z);
    double vx = state[2], w = state[3] - updraft, speed = sqrt(vx * vx + w * w), lift = state[4];
    double pressure = 0.5 * density * area * speed * speed;
    double d = (0.034 + 0.069662 * lift * lift) * pressure, l = lift * pressure;
    double sine = w / speed, cosine = vx / speed;
    acceleration[0] = (-l * sine - d * cosine) / mass;
    acceleration[1] = (l * cosine - d * sine) / mass - gravity;
}

void forces(int n, const double *states, double *accelerations) {
    for (int i = 0; i < n; i++) forces_at(states + 5 * i, accelerations + 2 * i);
}
