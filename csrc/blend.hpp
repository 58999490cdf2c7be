// Random-access blend: which source is sample i, how many draws of a source lie before it, and where is
// a source's j-th draw.
//
// A binary tree of integer splits. A node passes item i to its left child as item number
//     L(i) = floor(i p / 2^64 + 1/2)
// when L(i + 1) > L(i), and to its right child as item i - L(i) otherwise. Every question is one walk
// along a root-to-leaf path: no table grows with the number of samples. The tree is Huffman's over the
// weights, so the walk of an average sample is about as long as the entropy of the mixture.
//
// A share is held to |draws - share * i| <= bound(leaf) for every i up to 2^40: half a sample for each
// split above the leaf, damped by the splits below it.
#pragma once

#include <cstddef>
#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "integer.hpp"

namespace r1 {

class SplitTree {
 public:
  // `weights`: at least one, all positive, their sum below 2^64.
  explicit SplitTree(const std::vector<u64>& weights)
      : leaf_parent_(weights.size(), NO_PARENT), bound_(weights.size(), 0.0) {
    const i32 leaves = static_cast<i32>(weights.size());
    if (leaves == 1) return;
    // Ties go to the lower number: the tree is a function of the weights alone.
    using Entry = std::pair<u64, i32>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> open;
    for (i32 leaf = 0; leaf < leaves; ++leaf) open.push({weights[leaf], leaf});
    nodes_.reserve(leaves - 1);
    parent_.assign(leaves - 1, NO_PARENT);
    while (open.size() > 1) {
      const Entry light = open.top();
      open.pop();
      const Entry heavy = open.top();
      open.pop();
      const i32 node = static_cast<i32>(nodes_.size());
      const u64 sum = heavy.first + light.first;
      nodes_.push_back({saturate(((u128{heavy.first} << 64) + sum / 2) / sum), {0, 0}});
      attach(node, 0, heavy.second, leaves);
      attach(node, 1, light.second, leaves);
      open.push({sum, leaves + node});
    }
    root_ = static_cast<i32>(nodes_.size()) - 1;
    measure();
  }

  // The leaf of item i, and its number among that leaf's items.
  i32 locate(u64 i, u64& draw) const {
    i32 at = root_;
    while (at >= 0) {
      const Node& node = nodes_[at];
      const u128 product = u128{i} * node.share + HALF;
      const u64 low = static_cast<u64>(product), lefts = static_cast<u64>(product >> 64);
      const u64 right = low + node.share >= low;  // No carry: L does not step at this item.
      i = right ? i - lefts : lefts;
      at = node.child[right];
    }
    draw = i;
    return ~at;
  }

  // Items of `leaf` among items [0, i).
  u64 count(i32 leaf, u64 i) const {
    u64 path[MAX_DEPTH];
    int depth = 0;
    for (u64 link = leaf_parent_[leaf]; link != NO_PARENT; link = parent_[link >> 1]) path[depth++] = link;
    while (depth) {
      const u64 link = path[--depth];
      const u64 lefts = left_items(i, nodes_[link >> 1].share);
      i = link & 1 ? i - lefts : lefts;
    }
    return i;
  }

  // The item that is the leaf's number `draw`; NEVER where it does not fit 64 bits.
  u64 position(i32 leaf, u64 draw) const {
    for (u64 link = leaf_parent_[leaf]; link != NO_PARENT && draw != NEVER; link = parent_[link >> 1]) {
      const u64 share = nodes_[link >> 1].share;
      if (link & 1) {
        // Smallest m with m - L(m) > draw; the item is m - 1.
        draw = saturate(((u128{draw} << 64) + HALF) / (0 - share));
      } else {
        // Smallest m with L(m) > draw; the item is m - 1.
        draw = saturate(((u128{draw} << 64) + HALF + share - 1) / share - 1);
      }
    }
    return draw;
  }

  // Samples by which the draws of `leaf` may differ from its exact share of i, for any i up to 2^40.
  double bound(i32 leaf) const { return bound_[leaf]; }

  std::size_t bytes() const {
    return nodes_.size() * sizeof(Node) + (parent_.size() + leaf_parent_.size()) * sizeof(u64) +
           bound_.size() * sizeof(double);
  }

 private:
  struct Node {
    u64 share;     // The left child's part of the items, in units of 2^-64; at least one half.
    i32 child[2];  // Left, right: a node, or ~leaf.
  };
  static constexpr u64 HALF = u64{1} << 63;
  static constexpr u64 NO_PARENT = NEVER;
  // A Huffman tree whose weights sum below 2^64 is no deeper than the Fibonacci numbers allow (92).
  static constexpr int MAX_DEPTH = 96;

  static u64 left_items(u64 i, u64 share) { return static_cast<u64>((u128{i} * share + HALF) >> 64); }

  void attach(i32 node, int side, i32 item, i32 leaves) {
    const u64 link = static_cast<u64>(node) << 1 | static_cast<u64>(side);
    if (item < leaves) {
      nodes_[node].child[side] = ~item;
      leaf_parent_[item] = link;
    } else {
      nodes_[node].child[side] = item - leaves;
      parent_[item - leaves] = link;
    }
  }

  // Reporting only: nothing here decides the order.
  void measure() {
    constexpr double SHARE_ERROR = 0x1p-64 * 0x1p40;
    std::vector<double> at(nodes_.size(), 0.0);
    for (i32 node = root_; node >= 0; --node) {  // A parent is always made after its children.
      for (int side = 0; side < 2; ++side) {
        const double left = static_cast<double>(nodes_[node].share) * 0x1p-64;
        const double bound = 0.5 + (side ? 1.0 - left : left) * at[node] + SHARE_ERROR;
        const i32 child = nodes_[node].child[side];
        (child < 0 ? bound_[~child] : at[child]) = bound;
      }
    }
  }

  std::vector<Node> nodes_;
  std::vector<u64> parent_;       // Of a node: its parent << 1 | side.
  std::vector<u64> leaf_parent_;  // Of a leaf, likewise.
  std::vector<double> bound_;
  i32 root_ = ~0;
};

}  // namespace r1
