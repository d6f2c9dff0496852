/* A damped pendulum, by the midpoint rule: angles at each step. */
#include <math.h>

void simulate(const double *parameters, int steps, double *angles) {
    const double damping = parameters[0], frequency = parameters[1], dt = 0.02;
    double angle = parameters[2], speed = 0;
    for (int i = 0; i < steps; i++) {
        const double half_angle = angle + 0.5 * dt * speed;
        const double half_speed = speed - 0.5 * dt * (frequency * frequency * sin(angle) + damping * speed);
        angle += dt * half_speed;
        speed -= dt * (frequency * frequency * sin(half_angle) + damping * half_speed);
        angles[i] = angle;
    }
}
