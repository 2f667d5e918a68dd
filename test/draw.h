/* draw.h: anti-aliased lines, discs and letters on an sc_picture, after whose header it is
 * included. Widths are in pixels; a colour is 0xrrggbb; y goes down. */
#ifndef DRAW_H
#define DRAW_H
#include <math.h>
#include <string.h>

/* Covers the pixel with `part` of a colour. */
static void draw_pixel(sc_picture *p, int x, int y, unsigned colour, float part) {
    float *channel = p->rgb + (size_t)y * (size_t)p->width + (size_t)x;
    for (int shift = 16; shift >= 0; shift -= 8) {
        float value = (float)(colour >> shift & 255) / 127.5f - 1;
        *channel += part * (value - *channel);
        channel += p->width * p->height;
    }
}

/* Where on a picture the point (0, 0) is, and how many pixels a unit has. */
typedef struct draw_view {
    sc_picture *picture;
    float x, y, scale;
} draw_view;

/* From a to b with round ends; a disc, where they are the same. A pixel is covered by as much as
 * its centre is nearer to the line than half the width, from 0 to 1 within a pixel. */
static void draw_line(draw_view view, const float a[2], const float b[2], float width,
                      unsigned colour) {
    float ax = view.x + view.scale * a[0], ay = view.y + view.scale * a[1];
    float dx = view.scale * (b[0] - a[0]), dy = view.scale * (b[1] - a[1]), reach = width / 2 + 1;
    float last_x = (float)view.picture->width - 1, last_y = (float)view.picture->height - 1;
    int left = (int)fmaxf(0, ax + fminf(dx, 0) - reach);
    int top = (int)fmaxf(0, ay + fminf(dy, 0) - reach);
    int right = (int)fminf(last_x, ax + fmaxf(dx, 0) + reach);
    int bottom = (int)fminf(last_y, ay + fmaxf(dy, 0) + reach);
    for (int y = top; y <= bottom; y++) {
        for (int x = left; x <= right; x++) {
            float px = (float)x - ax, py = (float)y - ay;
            float along = (px * dx + py * dy) / fmaxf(dx * dx + dy * dy, 1e-6f);
            along = fminf(fmaxf(along, 0), 1);
            float part = width / 2 + 0.5f - hypotf(px - along * dx, py - along * dy);
            if (part > 0) draw_pixel(view.picture, x, y, colour, fminf(part, 1));
        }
    }
}

static void draw_disc(draw_view view, const float at[2], float diameter, unsigned colour) {
    draw_line(view, at, at, diameter, colour);
}

/* The colours of Okabe and Ito, which colour-blind people can tell apart. */
static const unsigned draw_palette[5] = {0x0072b2, 0xe69f00, 0x009e73, 0xcc79a7, 0xd55e00};

/* Letters as a pen draws them: points (x, y) on a grid of 4 by 6, y downwards; a blank lifts it. */
static const char *const draw_strokes[128] = {
    ['A'] = "062046 1434",
    ['B'] = "00063645443303 3342413000",
    ['C'] = "4130100105163645",
    ['D'] = "00062644422000",
    ['E'] = "40000646 0333",
    ['F'] = "400006 0333",
    ['G'] = "41301001051636454323",
    ['H'] = "0006 4046 0343",
    ['I'] = "2026",
    ['J'] = "4045361605",
    ['K'] = "0006 400346",
    ['L'] = "000646",
    ['M'] = "0600234046",
    ['N'] = "06004640",
    ['O'] = "103041453616050110",
    ['P'] = "06003041423303",
    ['Q'] = "103041453616050110 2446",
    ['R'] = "06003041423303 2346",
    ['S'] = "413010010213334445361605",
    ['T'] = "0040 2026",
    ['U'] = "000516364540",
    ['V'] = "002640",
    ['W'] = "0016223640",
    ['X'] = "0046 4006",
    ['Y'] = "002340 2326",
    ['Z'] = "00400646",
    ['0'] = "103041453616050110",
    ['1'] = "112026 1636",
    ['2'] = "01103041420646",
    ['3'] = "011030414233 1333 334445361605",
    ['4'] = "36300444",
    ['5'] = "4000033344453606",
    ['6'] = "30100105163645443303",
    ['7'] = "004016",
    ['8'] = "103041423313020110 1304051636454433",
    ['9'] = "16364541301001021343",
    ['.'] = "2626",
    [','] = "2617",
};

/* Capitals, digits, point and comma, `height` pixels high, their middle at x, their top at y. */
static void draw_text(sc_picture *p, float x, float y, float height, const char *text,
                      unsigned colour) {
    draw_view view = {p, x, y, height / 6};
    view.x -= (6 * (float)strlen(text) - 2) / 2 * view.scale;
    for (; *text; text++, view.x += 6 * view.scale) {
        const char *s = draw_strokes[*text & 127];
        for (; s && s[2]; s += s[2] == ' ' ? 3 : 2) {
            if (s[2] == ' ') continue;
            float from[2] = {(float)(s[0] - '0'), (float)(s[1] - '0')};
            float to[2] = {(float)(s[2] - '0'), (float)(s[3] - '0')};
            draw_line(view, from, to, height / 7, colour);
        }
    }
}
#endif
