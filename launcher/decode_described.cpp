// What dattn decode can be told, in words.
#include "launcher/decode_masks.hpp"
#include "launcher/decode_options.hpp"
#include "launcher/digests.hpp"
#include "launcher/values.hpp"
#include "launcher/watch.hpp"

namespace dattn {

namespace po = boost::program_options;

namespace {

std::vector<std::string> form_names() {
  std::vector<std::string> names;
  for (const Strategy& form : decode_forms()) names.emplace_back(form.name);
  for (const Strategy& form : decode_forms())
    names.push_back(std::string("latent-") + std::string(form.name));
  for (const char* sliced : {"latent-exact", "latent-tpla", "exact", "tpla"}) {
    names.emplace_back(sliced);
  }
  return names;
}

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const LatentModel& model : latent_models()) names.emplace_back(model.name);
  return names;
}

}  // namespace

po::options_description decode_options() {
  po::options_description options(
      "dattn decode: new tokens against a KV cache over the ranks of an MPI job");
  po::options_description heads("Attention (GQA)");
  heads.add_options()  //
      ("q", po::value<std::string>(),
       "NumPy file of Q, [tokens, heads, dim], f2, f4 or f8, of all tokens of all sequences, one "
       "sequence behind the other: each has its --context, then the --new ones of each step and "
       "warm-up step [generated]")                                                            //
      ("k", po::value<std::string>(), "NumPy file of K, [tokens, key heads, dim], likewise")  //
      ("v", po::value<std::string>(), "NumPy file of V, [tokens, value heads, value dim]")    //
      ("heads", po::value<Positive>(), "query heads [32; a model's own]")                     //
      ("kv-heads", po::value<Positive>(), "key and value heads [8]")                          //
      ("head-dim", po::value<Positive>(), "numbers a head of Q and K [128]")                  //
      ("value-dim", po::value<Positive>(), "numbers a head of V [as --head-dim]");
  po::options_description latent(
      "Latent attention (MLA); --model, --kv-rank or --weights asks for it");
  latent.add_options()  //
      ("model", word(model_names()),
       "the layer sizes of deepseek-v2-lite, deepseek-v3 or kimi-k2 (see dattn list); what follows "
       "changes some")                                                                           //
      ("hidden", po::value<Positive>(), "numbers of a token as it enters the layer")             //
      ("q-rank", po::value<Count>(), "of compressed queries; 0: not compressed")                 //
      ("kv-rank", po::value<Positive>(), "numbers of a latent")                                  //
      ("nope-dim", po::value<Positive>(), "numbers of a head's query and key without position")  //
      ("rope-dim", po::value<Positive>(), "with position")                                       //
      ("v-dim", po::value<Positive>(), "numbers of a head's value")                              //
      ("weights", po::value<std::string>(),
       "the layer in files: PREFIX.json and PREFIX.NAME.npy, as dattn convert writes them; see "
       "README [generated]")  //
      ("weights-dtype", word({"f4", "bf16"})->default_value("f4"),
       "of the weights in memory: bf16 rounds each once, and a step reads half the bytes")  //
      ("x", po::value<std::string>(),
       "NumPy file of hidden states as they enter the layer, [tokens, hidden], f2, f4 or f8, of "
       "all tokens of all sequences, one sequence behind the other: each has its --context, then "
       "the --new ones of each step and warm-up step [generated]")  //
      ("spectrum", po::value<Finite>()->default_value({0}),
       "generated weights: latents whose spectrum decays by this power, as trained ones do");
  po::options_description cut("Latents that are cut (--form latent-exact, latent-tpla)");
  cut.add_options()  //
      ("slices", po::value<Positive>(),
       "pieces of the latent; the ranks are a multiple of it and split the heads [latent-exact: as "
       "many as ranks; latent-tpla: the least divisor of the ranks that is 2 or more]")  //
      ("basis", word({"none", "hadamard", "pca"})->default_value("none"),
       "in which the latent is cut")  //
      ("norm", word({"exact", "slice"})->default_value("exact"),
       "tpla: RMS of the latent, or that of the slice by a fitted factor, as published")  //
      ("factor", word({"one", "energy", "fitted"})->default_value("fitted"),
       "tpla: of a slice's scores, 1, one over its share of the energy, or least squares")  //
      ("calibration", po::value<Positive>()->default_value({1024}),
       "tokens that basis and factors are fitted to: generated, or the first of --x");
  po::options_description work("Decoding");
  work.add_options()  //
      ("form", word(form_names())->default_value("sequence"),
       "how ranks share it (see dattn list); latent-NAME is NAME for latent attention")           //
      ("mesh", po::value<MeshSize>(), "extents of the mesh, tokens x heads, e.g. 4x2 for helix")  //
      ("context", po::value<std::string>()->default_value("4K"),
       "tokens in the cache before the first step: of all sequences, or n1,n2,... of each")  //
      ("batch", po::value<Positive>(), "sequences [1, or as many as --context has]")         //
      ("prefix-tree", po::value<std::string>(),
       "prefixes that sequences share, each cached once, in the words of the mask batch: "
       "levels=GxL:GxL, G groups of sequences with L tokens each, level by level; --context is "
       "then "
       "what a sequence has of its own [none]; files have the prefixes before the sequences")   //
      ("new", po::value<Positive>()->default_value({1}), "new tokens of a sequence in a step")  //
      ("steps", po::value<Positive>()->default_value({8}), "timed steps")                       //
      ("warmup", po::value<Count>()->default_value({1}), "steps before those")                  //
      ("dtype", word({"f4", "bf16"})->default_value("f4"), "of cache and queries")              //
      ("seed", po::value<Count>()->default_value({1}), "which numbers")                         //
      ("cache", word({"made", "prefill", "drawn"})->default_value("made"),
       "latent attention: rows of the context are made from hidden states where they are needed; "
       "or "
       "the context is prefilled by all ranks, and what it leaves handed over to --form; or rows "
       "are drawn, which is quick and cannot be checked")                              //
      ("threads", po::value<Positive>()->default_value({1}), "OpenMP threads a rank")  //
      ("values", word({"auto", "after", "before"})->default_value("auto"),
       "latent-sequence: W_UV is applied after the ranks' results are merged, or before, where "
       "v-dim "
       "numbers of a head travel in place of kv-rank but each rank reads W_UV of all heads; auto: "
       "whichever is fewer bytes, sent and read")                                       //
      ("check", "compare the last step with attention, or the whole layer, in double")  //
      ("memory", po::value<Positive>(),
       "bytes that a rank may use, e.g. 8G [what its host has, in equal shares]")  //
      ("rank-speeds", po::value<std::string>()->default_value(""),
       "how fast each rank reads its cache beside the others, e.g. 1,1,0.5 or 8x1,8x0.5: it keeps "
       "tokens in proportion (GQA); or measured: rounded and printed [all are equal]")  //
      ("out", po::value<std::string>(),
       "write what the last step gave as a NumPy file: O [sequences * new, heads, value dim]; of "
       "latent attention y [sequences * new, hidden]")  //
      ("lse", po::value<std::string>(),
       "write the LSE of its attention as a NumPy file, [sequences * new, heads]")            //
      ("json", po::value<std::string>(), "write the report as JSON [- for standard output]")  //
      ("help", "this text");
  options.add(heads)
      .add(decode_score_options())
      .add(decode_mask_options())
      .add(latent)
      .add(cut)
      .add(work);
  options.add(hosts_option()).add(verify_wire_option()).add(watch_options());
  return options;
}

}  // namespace dattn
